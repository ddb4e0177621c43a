"""Preference losses against TRL's own code, on the same weights and the same tokens; and where TRL differs, why."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from test_preference import batches_of, moved, told
from test_preference import pairs as pairs
from test_preference import unpaired as unpaired
from torch.nn.utils.rnn import pad_sequence

from luthier import configure
from luthier.assemble import assemble
from luthier.batch import Batch
from luthier.data import dataset
from luthier.objectives.sequences import token_logprobs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
trl = pytest.importorskip("trl")


class Scores(torch.nn.Module):
    """A model of transformers, asked as TRL asks one whose head is fused with the loss."""

    is_gradient_checkpointing = False

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, input_ids, attention_mask, labels, **more):
        logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].float()
        wanted = labels[:, 1:]
        logps = logits.log_softmax(-1).gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
        zeros = torch.zeros_like(logps)
        return SimpleNamespace(
            log_probs=logps.masked_fill(wanted == -100, 0.0), entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )


def padded(documents) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and completion_mask as TRL's collators make them."""
    tokens = [torch.from_numpy(d.tokens.astype("int64")) for d in documents]
    return {
        "input_ids": pad_sequence(tokens, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True),
        "completion_mask": pad_sequence(
            [torch.from_numpy((d.weights > 0).astype("int64")) for d in documents], batch_first=True
        ),
    }


@pytest.fixture
def trainer_self(tiny_model):
    """What TRL's loss functions look at, around a policy with these weights and the untouched reference."""

    def made(weights, **settings) -> SimpleNamespace:
        policy, reference = make_model(), make_model()
        policy.load_state_dict(weights)
        accelerator = SimpleNamespace(
            device=torch.device("cpu"), gather=lambda t: t, gather_for_metrics=lambda t: t,
            unwrap_model=lambda m: m,
        )  # fmt: skip
        metrics = {"train": {}, "eval": {}}
        for mode in metrics.values():
            mode.update({name: [] for name in (
                "entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy", "kl", "rewards/chosen",
                "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
                "logps/rejected")})  # fmt: skip
        plain = {
            "aux_loss_enabled": False, "ld_alpha": None, "f_divergence_type": "reverse_kl", "use_weighting": False,
            "label_smoothing": 0.0, "loss_types": ["sigmoid"], "loss_weights": [1.0], "precompute_ref_logps": False,
            "args": SimpleNamespace(gradient_checkpointing_kwargs=None), "_total_train_tokens": 0, "_tp_size": 1,
            "accelerator": accelerator, "_metrics": metrics, "beta": 0.1, "calculate_KL": True, "alpha": 0.0,
            "is_encoder_decoder": False,
        }  # fmt: skip
        return SimpleNamespace(**plain | settings, model=Scores(policy), ref_model=Scores(reference))

    return made


def at_hand(settings, **objective):
    """A moved network of ours, one batch of twelve rows, its documents, and the weights for TRL."""
    kind = objective.pop("method", "dpo")
    config = configure(settings, {"trainable": {"kind": "full"}, "objective": objective}, method=kind)
    made = assemble(config)
    moved(made)
    (batch,) = batches_of(made, 1 << 20)
    if kind == "kto":  # to where all answers are likelier than at the start, so that the reference point is not 0
        for _ in range(3):
            loss = -token_logprobs(made.network, batch).mean()
            loss.backward()
            with torch.no_grad():
                for p in made.parameters().values():
                    p -= 0.3 * p.grad
                    p.grad = None
    rows, _ = dataset.open_rows(config.data, made.renderer, None, print, print)
    weights = {name: t.detach().clone() for name, t in made.network.model.state_dict().items()}
    return made, batch, list(rows.documents[:12]), weights


SHARED = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"beta": 0.3}, {"beta": 0.3}),
        ({"beta": 0.3, "loss_type": "hinge"}, {"beta": 0.3, "loss_types": ["hinge"]}),
        ({"beta": 0.3, "loss_type": "ipo"}, {"beta": 0.3, "loss_types": ["ipo"]}),
        ({"loss_type": "robust", "label_smoothing": 0.2}, {"loss_types": ["robust"], "label_smoothing": 0.2}),
    ],
    ids=lambda v: v.get("loss_type", ""),
)
def test_dpo_is_trls(pairs, trainer_self, ours, theirs):
    from trl import DPOTrainer

    made, batch, documents, weights = at_hand(pairs, **ours)
    mine = trainer_self(weights, **theirs)
    members = [document.members for document in documents]
    inputs = padded([m[0] for m in members] + [m[1] for m in members])
    loss = DPOTrainer._compute_loss(mine, mine.model, inputs, False)
    found, metrics, gradients = told(made, [batch])
    assert found == pytest.approx(float(loss), rel=1e-5)
    for name in (*SHARED, "rewards/accuracies"):
        assert metrics[name] == pytest.approx(mine._metrics["train"][name][-1], rel=1e-4, abs=1e-5), name
    loss.backward()
    for name, parameter in mine.model.inner.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-3)


def test_rpo_is_trls_but_for_what_a_mean_is_over(pairs, trainer_self):
    """TRL adds the mean over all tokens of its micro-batch, in which long answers count more and which changes with the
    cut; arXiv:2404.19733 has the mean over the tokens of each answer, as here. Alone in a batch, a pair has both."""
    from trl import DPOTrainer

    made, _, documents, weights = at_hand(pairs, rpo_alpha=0.7)
    mine = trainer_self(weights, loss_types=["sigmoid", "sft"], loss_weights=[1.0, 0.7])
    losses = []
    for document in documents[:3]:
        loss = DPOTrainer._compute_loss(mine, mine.model, padded(document.members), False)
        losses.append(float(loss))
        assert told(made, [Batch.pack([document])])[0] == pytest.approx(losses[-1], rel=1e-5)
    assert told(made, [Batch.pack(documents[:3])])[0] == pytest.approx(sum(losses) / 3, rel=1e-5)


def logps_of(function, mine, members, mean: bool) -> torch.Tensor:
    """[2 U] by TRL's own function, better answers first."""
    inputs = padded(members)
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    logits = mine.model.inner(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return function(logits, labels, average_log_prob=mean)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"method": "cpo", "cpo_alpha": 0.0}, {"loss_type": "sigmoid", "label_smoothing": 0.0}),
        ({"method": "cpo", "cpo_alpha": 0.0, "label_smoothing": 0.1}, {"loss_type": "sigmoid", "label_smoothing": 0.1}),
        ({"method": "cpo", "cpo_alpha": 0.0, "loss_type": "hinge"}, {"loss_type": "hinge"}),
        ({"method": "cpo", "cpo_alpha": 0.0, "loss_type": "ipo"}, {"loss_type": "ipo"}),
        ({"method": "simpo", "beta": 2.0, "simpo_gamma": 0.7}, {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7}),
    ],
    ids=lambda v: v.get("loss_type", v.get("method", "")),
)
def test_cpo_and_simpo_are_trls(pairs, trainer_self, ours, theirs):
    """Without the better answer's own loss, of which TRL takes a mean over all tokens of its micro-batch."""
    from trl.experimental.cpo import CPOTrainer

    made, batch, documents, weights = at_hand(pairs, **ours)
    mine = trainer_self(weights, **theirs)
    members = [d.members[0] for d in documents] + [d.members[1] for d in documents]
    logps = logps_of(CPOTrainer.get_batch_logps, mine, members, theirs["loss_type"] in ("ipo", "simpo"))
    losses, better, worse = CPOTrainer.cpo_loss(mine, *logps.chunk(2))
    found, metrics, gradients = told(made, [batch])
    assert found == pytest.approx(float(losses.mean()), rel=1e-5)
    assert metrics["rewards/chosen"] == pytest.approx(float(better.mean()), rel=1e-4)
    assert metrics["rewards/rejected"] == pytest.approx(float(worse.mean()), rel=1e-4)
    losses.mean().backward()
    for name, parameter in mine.model.inner.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-3)


def test_orpo_is_trls_odds_ratio_beside_the_answers_own_loss(pairs, trainer_self):
    """The loss of arXiv:2403.07691 is that of the answer given the prompt. TRL takes it over the prompt, too ("computed
    over the full prompt and response"), and as a mean over all tokens of its micro-batch: here it is neither."""
    from trl.experimental.orpo import ORPOTrainer

    made, batch, documents, weights = at_hand(pairs, method="orpo", beta=0.4)
    mine = trainer_self(weights, beta=0.4)
    members = [d.members[0] for d in documents] + [d.members[1] for d in documents]
    means = logps_of(ORPOTrainer.get_batch_logps, mine, members, True)
    losses, better, worse, _, _ = ORPOTrainer.odds_ratio_loss(mine, *means.chunk(2))
    wanted = (-means.chunk(2)[0] - losses).mean()
    found, metrics, gradients = told(made, [batch])
    assert found == pytest.approx(float(wanted), rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(float((better - worse).mean()), rel=1e-3)
    wanted.backward()
    for name, parameter in mine.model.inner.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("weight", [1.0, 0.6])
def test_kto_is_trls_where_its_micro_batch_is_the_step(unpaired, trainer_self, weight):
    """On a whole step TRL's loss is ours. Cut in two, TRL has a reference point for each half and so another gradient
    for the same rows; here the point is that of the step."""
    from trl import KTOTrainer

    made, batch, documents, weights = at_hand(unpaired, method="kto", beta=0.3, undesirable_weight=weight)
    mine = trainer_self(weights, beta=0.3, loss_type="kto", desirable_weight=1.0, undesirable_weight=weight)
    mine._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(mine, model, batch)
    members = [document.members for document in documents]
    assert all(len(m) == 2 for m in members)

    def inputs(part: slice) -> dict:
        own, strange = padded([m[0] for m in members[part]]), padded([m[1] for m in members[part]])
        labels = torch.tensor([bool(d.labels[0]) for d in documents[part]])
        return own | {f"KL_{name}": t for name, t in strange.items()} | {"label": labels}

    loss = KTOTrainer._compute_loss(mine, mine.model, inputs(slice(12)), False)
    found, metrics, gradients = told(made, [batch])
    assert mine._metrics["train"]["kl"][-1] > 0
    assert found == pytest.approx(float(loss), rel=1e-5)
    for name in (*SHARED, "kl"):
        assert metrics[name] == pytest.approx(mine._metrics["train"][name][-1], rel=1e-4, abs=1e-5), name
    loss.backward()
    for name, parameter in mine.model.inner.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-3)
    halves = [KTOTrainer._compute_loss(mine, mine.model, inputs(part), False) for part in (slice(6), slice(6, 12))]
    assert abs(float(sum(halves)) / 2 - float(loss)) > 1e-3
    assert told(made, [batch.select(0, 6), batch.select(6, 12)])[0] == pytest.approx(found, rel=1e-5)
