"""Rounds and runs of training: state machine, run lifecycle, round execution, collection and admission of updates."""
