"""One module per golden system. `KINDS` maps a kind of case to a function Case -> the case's outputs by name."""
