"""Tiny models with heads for tasks, batches for them, and what autograd makes of transformers' own
loss."""

from typing import Any

import torch
from torch import Tensor, nn

VOCAB, LABELS, LENGTHS = 100, 3, (12, 7, 9, 4)
_ENCODER = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0)
_DECODER = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                intermediate_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_AUTO = {"classify": "AutoModelForSequenceClassification", "tokens": "AutoModelForTokenClassification",
         "masked-lm": "AutoModelForMaskedLM"}


def config(family: str, **changes: Any) -> Any:
    import transformers as t

    plain = {name: value for name, value in _ENCODER.items() if "dropout" not in name}
    made = {
        "bert": lambda: t.BertConfig(**_ENCODER),
        "roberta": lambda: t.RobertaConfig(**{**_ENCODER, "pad_token_id": 1}, max_position_embeddings=66),
        "distilbert": lambda: t.DistilBertConfig(vocab_size=VOCAB, dim=32, n_layers=3, n_heads=4, hidden_dim=64, dropout=0.0,
                                                 attention_dropout=0.0, seq_classif_dropout=0.0, pad_token_id=0),
        "electra": lambda: t.ElectraConfig(**_ENCODER, embedding_size=16, summary_last_dropout=0.0),
        "albert": lambda: t.AlbertConfig(**_ENCODER, embedding_size=16, classifier_dropout_prob=0.0),
        "deberta-v2": lambda: t.DebertaV2Config(**_ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"],
                                                position_buckets=8, share_att_key=True, pooler_dropout=0.0),
        "modernbert": lambda: t.ModernBertConfig(**plain, local_attention=8, cls_token_id=1, sep_token_id=2, bos_token_id=1,
                                                 eos_token_id=2),
        "llama": lambda: t.LlamaConfig(**_DECODER),
        "mistral": lambda: t.MistralConfig(**_DECODER, sliding_window=6),
        "gpt2": lambda: t.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=VOCAB, pad_token_id=0, bos_token_id=1,
                                     eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    }[family]()
    for name, value in {"num_labels": LABELS, "classifier_dropout": 0.0, **changes}.items():
        setattr(made, name, value)
    return made


def model(family: str, task: str, **changes: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, _AUTO[task]).from_config(config(family, **changes)).train()


def batch(task: str, pad: int, seed: int = 0) -> dict[str, Tensor]:
    """Rows of unlike lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB, (len(LENGTHS), max(LENGTHS)), generator=generator)
    shown = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    labels = {"classify": lambda: torch.tensor([0, 1, 2, 1]), "tokens": lambda: torch.where(shown, ids % LABELS, -100),
              "masked-lm": lambda: torch.where(shown & (ids % 4 == 0), ids, -100)}[task]()
    return {"input_ids": torch.where(shown, ids, pad), "attention_mask": shown.long(), "labels": labels}


def gradients(module: nn.Module, given: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the class's own forward."""
    module.zero_grad()
    loss = module(**given).loss
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def session_gradients(session: Any) -> dict[str, Tensor]:
    """After one step without clipping: AdamW's first moment is the gradient times ``1 - beta1``."""
    found = {}
    for unit in session.plan.spec.units:
        moment = session.read_state(unit, "m") / (1 - session.options.betas[0])
        found.update({p.name: moment[p.offset : p.end].view(p.shape) for p in unit.params if p.trainable})
    return found


WORDS = "good bad film great awful plot fine poor music story the a was is very and not so really end".split()


def tokenizer() -> Any:
    """WordPiece, as BERT's, with words that it splits."""
    from transformers import BertTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS, "##s", "##ing", "##er"])}
    return BertTokenizer(vocab=vocabulary)


def directory(path: Any, family: str, task: str | None, **changes: Any) -> Any:
    """A Hugging Face directory with a tokenizer; ``task`` None: the model without a head."""
    import transformers

    torch.manual_seed(1)
    made = transformers.AutoModel.from_config(config(family, **changes)) if task is None else model(family, task, **changes)
    made.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path
