"""Files of quantised models, one for each library that reads them."""
