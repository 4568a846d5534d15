"""Labeling: from questions to a dataset that says where the SLM's choice changes the path (R2R, section 4.1).

    respond ─▶ compare ─▶ continue ─▶ verify ─▶ build

`python -m labeling --config configs/labeling/abacus.yaml`
"""
