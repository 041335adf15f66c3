"""Whether Ratel trains a model of transformers rightly, found out on a small copy of it and
compared from outside: with autograd, with the documents apart, with what transformers reads
back."""
