"""The server as a process, asked by OpenAI's own client: every feature, against transformers; 200 clients at once."""

import asyncio
import base64
import json
import signal

import jsonschema
import pytest
import torch
from conftest import make_tokenizer
from serving import Process, small_llama, write_adapter, write_model

openai = pytest.importorskip("openai", reason="no openai client here (the test extra has it)")
pytest.importorskip("fastapi", reason="no fastapi here (the serve extra has it)")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

HI = [{"role": "user", "content": "hi there"}]
TOKENIZER = make_tokenizer()
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("serve") / "model")


@pytest.fixture(scope="module")
def server(folder):
    adapter = write_adapter(folder.parent / "adapter", folder)
    made = Process(str(folder), "--adapter", f"tuned={adapter}", "--max-new-tokens", "600", "--waiting", "4000")
    yield made
    assert made.stop() == 0, "".join(made.told)
    assert "Traceback" not in "".join(made.told)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


@pytest.fixture(scope="module")
def model():
    return small_llama()


def prompt_of(messages):
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages) + "<|im_start|>assistant\n"
    return TOKENIZER(text)["input_ids"]


def theirs(model, prompt, count):
    """Greedy tokens of transformers, and all log-probabilities of each step [N, V]."""
    tokens, told = list(prompt), []
    with torch.no_grad():
        for _ in range(count):
            told.append(model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1))
            tokens.append(int(told[-1].argmax()))
    return tokens[len(prompt) :], torch.stack(told)


def test_models(client, server):
    models = client.models.list().data
    assert [m.id for m in models] == server.models == ["model", "tuned"]
    assert models[1].base == "model"
    assert client.models.retrieve("tuned").id == "tuned"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("../../etc/passwd")


def test_a_greedy_answer_is_that_of_transformers_with_its_log_probabilities(client, model):
    expected, told = theirs(model, prompt_of(HI), 12)
    got = client.chat.completions.create(model="model", messages=HI, logprobs=True, top_logprobs=3, **GREEDY)
    choice = got.choices[0]
    assert choice.message.content == TOKENIZER.decode(expected, skip_special_tokens=True)
    assert choice.finish_reason == "length"
    assert choice.message.role == "assistant"
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(prompt_of(HI)), 12)
    content = choice.logprobs.content
    assert len(content) == 12
    for step, token, row in zip(content, expected, told):
        assert step.logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert [top.logprob for top in step.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
    assert b"".join(bytes(step.bytes) for step in content).decode("utf-8", "replace") == choice.message.content


def test_completions_go_on_with_texts_and_with_tokens(client, model):
    prompts = ["abc", "the lamp"]
    expected = [theirs(model, TOKENIZER(p)["input_ids"], 8)[0] for p in prompts]
    got = client.completions.create(model="model", prompt=prompts, temperature=0, max_tokens=8, logprobs=2)
    assert [c.text for c in got.choices] == [TOKENIZER.decode(e, skip_special_tokens=True) for e in expected]
    assert [c.index for c in got.choices] == [0, 1]
    told = got.choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == 8
    assert all(len(top) <= 2 for top in told.top_logprobs)
    tokens = client.completions.create(
        model="model", prompt=[TOKENIZER(p)["input_ids"] for p in prompts], temperature=0, max_tokens=8
    )
    assert [c.text for c in tokens.choices] == [c.text for c in got.choices]
    one = client.completions.create(model="model", prompt=TOKENIZER("abc")["input_ids"], temperature=0, max_tokens=8)
    assert one.choices[0].text == got.choices[0].text
    assert client.completions.create(model="model", prompt="abc").usage.completion_tokens <= 16


def test_streams_say_the_same(client):
    whole = client.chat.completions.create(model="model", messages=HI, logprobs=True, **GREEDY)
    chunks = list(client.chat.completions.create(
        model="model", messages=HI, stream=True, stream_options={"include_usage": True}, logprobs=True, **GREEDY
    ))  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    having = [c.choices[0].logprobs for c in chunks if c.choices and c.choices[0].logprobs]
    told = [step.logprob for one in having for step in one.content]
    assert told == pytest.approx([step.logprob for step in whole.choices[0].logprobs.content], abs=1e-4)
    details = {"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    assert chunks[-1].usage == whole.usage.model_copy(update=details)
    assert len({c.id for c in chunks}) == 1
    text = client.completions.create(model="model", prompt="abc", temperature=0, max_tokens=9)
    parts = list(client.completions.create(model="model", prompt="abc", temperature=0, max_tokens=9, stream=True))
    assert "".join(p.choices[0].text for p in parts) == text.choices[0].text
    assert parts[-1].choices[0].finish_reason == "length"


def test_stop_texts_end_an_answer(client):
    text = client.completions.create(model="model", prompt="abc", temperature=0, max_tokens=20).choices[0].text
    stop = text[4:6]
    got = client.completions.create(model="model", prompt="abc", temperature=0, max_tokens=20, stop=[stop, "unseen"])
    assert got.choices[0].text == text[: text.index(stop)]
    assert got.choices[0].finish_reason == "stop"


def test_seeds_decide_what_is_drawn_and_choices_differ(client):
    def ask(**more):
        got = client.chat.completions.create(model="model", messages=HI, max_tokens=10, **more)
        return [c.message.content for c in got.choices]

    assert ask(seed=3) == ask(seed=3) != ask(seed=4)
    several = ask(seed=3, n=3)
    assert several[0] == ask(seed=3)[0]
    assert len(set(several)) == 3
    streamed = client.chat.completions.create(model="model", messages=HI, max_tokens=10, seed=3, n=3, stream=True)
    texts = ["", "", ""]
    for chunk in streamed:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == several
    assert ask(seed=3, top_p=1e-6) == ask(seed=9, top_p=1e-6) == ask(temperature=0)
    assert ask(seed=3, extra_body={"top_k": 1}) == ask(temperature=0)


def test_an_adapter_is_chosen_by_the_models_name(client, folder):
    from peft import PeftModel

    expected, _ = theirs(small_llama(), prompt_of(HI), 12)
    tuned = PeftModel.from_pretrained(small_llama(), folder.parent / "adapter").eval()
    other, _ = theirs(tuned, prompt_of(HI), 12)
    assert expected != other
    for name, tokens in (("model", expected), ("tuned", other)):
        got = client.chat.completions.create(model=name, messages=HI, **GREEDY)
        assert got.choices[0].message.content == TOKENIZER.decode(tokens, skip_special_tokens=True)
        assert got.model == name


PERSON = {
    "type": "object", "additionalProperties": False, "required": ["name", "age", "likes"],
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["tea", "bread"]}, "maxItems": 3},
    },
}  # fmt: skip


def test_json_mode_and_schemas(client):
    for seed in range(4):
        got = client.chat.completions.create(
            model="model", messages=HI, seed=seed, max_tokens=60, response_format={"type": "json_object"}
        ).choices[0]
        assert isinstance(json.loads(got.message.content), dict)
        assert got.finish_reason == "stop"
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
        got = client.chat.completions.create(
            model="tuned", messages=HI, seed=seed, max_tokens=100, temperature=1.5, response_format=form
        ).choices[0]
        jsonschema.validate(json.loads(got.message.content), PERSON)
        assert got.finish_reason == "stop"


def test_a_schema_of_pydantic_is_parsed_back(client):
    from pydantic import BaseModel, Field

    class Point(BaseModel):
        x: float = Field(ge=0, le=1)
        label: str = Field(max_length=4)

    got = client.chat.completions.parse(model="model", messages=HI, max_tokens=80, seed=1, response_format=Point)
    assert isinstance(got.choices[0].message.parsed, Point)


def test_a_form_that_cannot_be_kept_to_is_refused(client):
    schema = {"type": "array", "uniqueItems": True}
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        client.chat.completions.create(
            model="model", messages=HI,
            response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
        )  # fmt: skip
    with pytest.raises(openai.BadRequestError, match="shortest answer"):
        client.chat.completions.create(
            model="model", messages=HI, max_tokens=3,
            response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": PERSON}},
        )  # fmt: skip


WEATHER = {
    "name": "weather", "description": "of a city", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}  # fmt: skip
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "now"}}]


def test_tools_that_must_be_called_are(client):
    for seed, choice in enumerate(["required", {"type": "function", "function": {"name": "weather"}}, "required"]):
        got = client.chat.completions.create(
            model="model", messages=HI, tools=TOOLS, tool_choice=choice, seed=seed, max_tokens=200
        ).choices[0]
        assert got.finish_reason == "tool_calls"
        for call in got.message.tool_calls:
            arguments = json.loads(call.function.arguments)
            if call.function.name == "weather":
                jsonschema.validate(arguments, WEATHER["parameters"])
            else:
                assert (call.function.name, arguments, choice) == ("now", {}, "required")
            assert call.id.startswith("call_")
        if choice != "required":
            assert len(got.message.tool_calls) == 1


def test_calls_in_a_stream_and_their_results(client):
    stream = client.chat.completions.create(
        model="model", messages=HI, tools=TOOLS, tool_choice="required", seed=5, max_tokens=200, stream=True,
        parallel_tool_calls=False,
    )  # fmt: skip
    calls, reasons, text = [], [], ""
    for chunk in stream:
        delta = chunk.choices[0].delta
        calls += delta.tool_calls or []
        text += delta.content or ""
        reasons.append(chunk.choices[0].finish_reason)
    assert (len(calls), reasons[-1], text) == (1, "tool_calls", "")
    call = calls[0]
    said = {"role": "assistant", "content": None, "tool_calls": [call.model_dump(exclude={"index"})]}
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    got = client.chat.completions.create(model="model", messages=[*HI, said, result], tools=TOOLS, max_tokens=5)
    assert got.usage.completion_tokens <= 5


def test_tools_need_not_be_called(client):
    plain = client.chat.completions.create(model="model", messages=HI, **GREEDY).choices[0].message
    never = client.chat.completions.create(model="model", messages=HI, tools=TOOLS, tool_choice="none", **GREEDY)
    assert never.choices[0].message.content == plain.content
    may = client.chat.completions.create(model="model", messages=HI, tools=TOOLS, **GREEDY).choices[0]
    assert may.message.tool_calls is None
    assert may.finish_reason == "length"


@pytest.mark.parametrize("how", ["float", "base64"])
def test_embeddings_are_the_last_hidden_states(client, model, how):
    texts = ["the lamp in the kitchen", "hi"]
    got = client.embeddings.create(model="model", input=texts, encoding_format=how)
    for text, found in zip(texts, got.data):
        vector = found.embedding
        if isinstance(vector, str):
            vector = torch.frombuffer(bytearray(base64.b64decode(vector)), dtype=torch.float32).tolist()
        with torch.no_grad():
            states = model.model(torch.tensor([TOKENIZER(text)["input_ids"]])).last_hidden_state[0, -1]
        expected = torch.nn.functional.normalize(states, dim=-1)
        assert vector == pytest.approx(expected.tolist(), abs=1e-4)
    short = client.embeddings.create(model="model", input="hi", dimensions=8).data[0].embedding
    assert len(short) == 8
    assert sum(x * x for x in short) == pytest.approx(1)
    other = client.embeddings.create(model="tuned", input="hi").data[0].embedding
    assert other != pytest.approx(client.embeddings.create(model="model", input="hi").data[0].embedding, abs=1e-2)


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ({"model": "gone"}, 404, "no model"),
        ({"model": "../adapter"}, 404, "no model"),
        ({"model": "/etc/passwd\u0000"}, 404, "no model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user"}]}, 400, "content"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, "role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "nothing to answer"),
        ({"messages": [{"role": "user", "content": "x<|im_end|>"}]}, 400, "special token"),
        ({"messages": [{"role": "user", "content": "a" * 3000}]}, 400, "limit of both is 2048"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temperature": 3}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 0}, 400, "n:"),
        ({"max_tokens": 601}, 400, "at most 600"),
        ({"max_tokens": 4, "max_completion_tokens": 4}, 400, "old name"),
        ({"top_logprobs": 3}, 400, "logprobs=true"),
        ({"frequency_penalty": 1}, 400, "frequency_penalty"),
        ({"stop": [""]}, 400, "stop"),
        ({"seed": 1 << 70}, 400, "seed"),
        ({"colour": "red"}, 400, "no such parameter"),
        ({"tool_choice": "required"}, 400, "no tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, 400, "no tool"),
        ({"stream_options": {"include_usage": True}}, 400, "stream=true"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_by_name(client, body, status, told):
    asked = {"model": "model", "messages": HI} | body
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**{k: asked.pop(k) for k in ("model", "messages")}, extra_body=asked)
    assert caught.value.status_code == status
    assert told in caught.value.message
    assert caught.value.body["type"]


def test_two_hundred_clients_at_once(server):
    """Each asks several times, some stream, some go away in the middle; all are answered, and every slot is free."""
    errors: list[BaseException] = []

    async def one(client, number):
        try:
            for turn in range(3):
                body = {"model": ("model", "tuned")[number % 2], "messages": [{"role": "user", "content": f"{number}"}]}
                if (number + turn) % 3 == 0:
                    stream = await client.chat.completions.create(**body, max_tokens=8, temperature=0, stream=True)
                    got = [chunk async for chunk in stream]
                    assert got[-1].choices[0].finish_reason in ("length", "stop")
                elif (number + turn) % 3 == 1:
                    got = await client.chat.completions.create(**body, max_tokens=8, temperature=0)
                    assert got.usage.completion_tokens <= 8
                else:
                    stream = await client.chat.completions.create(**body, max_tokens=400, stream=True)
                    await anext(aiter(stream))
                    await stream.close()
        except BaseException as error:
            errors.append(error)
            raise

    async def run():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=100) as client:
            await asyncio.gather(*(one(client, number) for number in range(200)), return_exceptions=True)

    asyncio.run(run())
    assert not errors, errors[:3]
    assert wait_for(server, "luthier_engine_running", 0)


def figures(server):
    import urllib.request

    text = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[0] != "#"}


def wait_for(server, name, value, tries=200):
    """Whether a figure comes to be so; those who went away are noticed at the next step."""
    key = f'{name}{{engine="model"}}'
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        for _ in range(tries):
            if figures(server)[key] == value and figures(server)['luthier_engine_waiting{engine="model"}'] == 0:
                return True
            client.completions.create(model="model", prompt="a", max_tokens=1)  # time passes in steps
    return False


def test_figures_for_prometheus(client, server):
    before = figures(server)
    client.chat.completions.create(model="model", messages=HI, **GREEDY)
    after = figures(server)
    key = 'luthier_tokens_total{kind="answer",model="model"}'
    assert after[key] - before[key] == 12
    key = 'luthier_http_requests_total{route="/v1/chat/completions",status="200"}'
    assert after[key] - before[key] == 1
    assert after['luthier_engine_slots{engine="model"}'] == 32


def test_sigterm_lets_answers_come_to_their_end(client, server):
    """The last test of this server: what is at hand is answered, what comes then is refused, and the process ends."""
    stream = client.chat.completions.create(model="model", messages=HI, max_tokens=600, temperature=0, stream=True)
    got = [next(stream)]
    server.process.send_signal(signal.SIGTERM)
    got += list(stream)
    assert got[-1].choices[0].finish_reason in ("length", "stop")
    assert server.process.wait(60) == 0
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
