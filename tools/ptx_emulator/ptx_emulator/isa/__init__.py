"""Translation of single PTX instructions to C++.

`table.py` maps each opcode to its forms. An instruction whose result is one C++ expression is a
`Form` (`forms.py`). Every other instruction is a function in the module of its family.
"""
