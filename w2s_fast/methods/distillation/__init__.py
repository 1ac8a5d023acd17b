"""Distillation methods: EISL, MEAL V2, FerKD, TGeo-KD."""
