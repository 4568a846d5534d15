"""Labeling: from questions to a dataset that says where the SLM's choice changes the path.

    respond ─▶ compare ─▶ continue ─▶ verify ─▶ build

After R2R (arXiv 2505.21600, section 4.1): `python -m labeling --config FILE`.
"""
