from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from small import base_model
from torch import Tensor, nn
from torch.nn import functional

from folora.divergence import HeldOutText, log_probabilities

VOCABULARY = 6
ROWS = [[1, 3, 5, 2], [1, 4], [1, 0, 0, 2, 5, 3, 4], [1, 2, 2], [1]]


class Causal(nn.Module):
    """A language model that sees the sum of all tokens so far; padding comes after them and must not count."""

    device = torch.device("cpu")
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=VOCABULARY))

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY)
        self.head.weight.data *= torch.logspace(-1, 1, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> SimpleNamespace:
        assert attention_mask.shape == input_ids.shape
        assert not use_cache
        return SimpleNamespace(logits=self.head(self.embedding(input_ids).cumsum(1).tanh()))

    def rows(self) -> list[Tensor]:
        """Logits that predict tokens, (length - 1, vocabulary) a row, unpadded."""
        ids = [torch.tensor([row]) for row in ROWS]
        return [self(one, torch.ones_like(one), use_cache=False).logits[0, :-1].detach() for one in ids]


@pytest.fixture
def base() -> Causal:
    return Causal(0)


@pytest.fixture
def adapted() -> Causal:
    return Causal(1)


def kl(base: Causal, adapted: Causal) -> float:
    """Torch's own, in float64, over the rows one by one."""
    pairs = list(zip(base.rows(), adapted.rows(), strict=True))
    p = torch.cat([one for one, _ in pairs]).double().log_softmax(-1)
    q = torch.cat([other for _, other in pairs]).double().log_softmax(-1)
    return float(functional.kl_div(q, p, reduction="batchmean", log_target=True))


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_agrees_with_torch_for_any_batch_size_and_padding(
    base: Causal, adapted: Causal, batch_size: int, padding: int
) -> None:
    found = HeldOutText(base, ROWS, batch_size, padding).measure(adapted)
    assert found.kl == pytest.approx(kl(base, adapted), rel=1e-5)
    targets = torch.tensor([token for row in ROWS for token in row[1:]])
    loss = functional.cross_entropy(torch.cat(adapted.rows()).double(), targets)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_direction_is_from_base_to_adapted(base: Causal, adapted: Causal) -> None:
    found = HeldOutText(base, ROWS, 2, 0).measure(adapted).kl
    assert found > 0.1
    assert found != pytest.approx(kl(adapted, base), rel=0.1)


def test_base_has_not_moved_from_itself(base: Causal) -> None:
    assert HeldOutText(base, ROWS, 2, 0).measure(base).kl == 0


def test_base_is_remembered_when_the_same_object_is_adapted(base: Causal, adapted: Causal) -> None:
    original = copy.deepcopy(base)
    text = HeldOutText(base, ROWS, 2, 0)
    base.load_state_dict(adapted.state_dict())
    assert text.measure(base).kl == pytest.approx(kl(original, adapted), rel=1e-5)


def test_a_base_with_too_many_predictions_is_asked_again(
    base: Causal, adapted: Causal, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = HeldOutText(base, ROWS, 2, 0).measure(adapted)
    monkeypatch.setattr("folora.divergence.KEPT_BYTES", 0)
    text = HeldOutText(base, ROWS, 2, 0)
    assert text.measure(adapted, lambda batch: base(**batch, use_cache=False).logits) == kept


def test_the_base_is_a_peft_model_without_its_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model

    monkeypatch.setattr("folora.divergence.KEPT_BYTES", 0)
    model = base_model()
    before = HeldOutText(copy.deepcopy(model), ROWS, 2, 0)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    expected = before.measure(wrapped, lambda batch: base_model()(**batch).logits)
    assert HeldOutText(model, ROWS, 2, 0).measure(wrapped) == expected
    assert expected.kl > 0


def test_measuring_twice_gives_the_same(base: Causal, adapted: Causal) -> None:
    text = HeldOutText(base, ROWS, 2, 0)
    assert text.measure(adapted) == text.measure(adapted)


def test_log_probabilities_predict_every_token_but_the_first(base: Causal) -> None:
    ids = torch.tensor(ROWS[:1])
    found = log_probabilities(base.bfloat16(), ids, torch.ones_like(ids, dtype=torch.bool))
    assert found.shape == (1, 3, VOCABULARY)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(1, 3))
    torch.testing.assert_close(found[0], base.rows()[0].float().log_softmax(-1))
