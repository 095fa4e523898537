"""Adapters from and for PEFT: `import_peft` and `export_peft`. docs/peft.md says what is taken.

What a folder of PEFT means is asked of PEFT: `saved.load` builds its model, and the other modules
read the weights from there. Only the two commands import this package: it imports `peft`.
"""
