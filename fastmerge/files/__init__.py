"""Merging checkpoint files: any architecture, tensor by tensor, straight from the files into the output.

inputs.py opens what people have (safetensors, shards, .bin, run folders, peft adapters), plan.py compares the headers
and tells every problem, rules.py applies the merge rules to parts of tensors, stream.py goes through the plan, write.py
writes the output.
"""
