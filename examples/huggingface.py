"""A transformers model: from a directory if one is given, else a small new one; then it writes a
few words.

    python examples/huggingface.py
    python examples/huggingface.py --model /path/to/model --data my.jsonl
"""

import argparse
from collections.abc import Sequence
from typing import Any

import ratel


def new_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(hidden_size=128, intermediate_size=384, num_hidden_layers=4,
                                        num_attention_heads=4, num_key_value_heads=2, vocab_size=512,
                                        max_position_embeddings=1024))


def write(directory: str, prompt: str) -> str:
    """What the trained model makes of the prompt; Ratel's output is an ordinary transformers
    directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    tokens = model.generate(**tokenizer(prompt, return_tensors="pt", return_token_type_ids=False), max_new_tokens=40,
                            do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def main(arguments: Sequence[str] | None = None) -> ratel.TrainResult:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Hugging Face directory (default: a small Llama, from scratch)")
    parser.add_argument("--data", help=".txt or .jsonl file, or a directory of them (default: the bundled text)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", help="where results go (default: a new directory under runs/)")
    args = parser.parse_args(arguments)
    result = ratel.train(args.model or new_model(), args.data, steps=args.steps, batch_size=8, seq_len=128,
                         lr=1e-5 if args.model else 2e-3, out=args.out)
    print(write(str(result.out / "model"), "Return the"))
    return result


if __name__ == "__main__":
    main()
