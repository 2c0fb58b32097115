"""base, mid, sft, rl: each file says what is particular to its stage; `common` is what they share."""
