"""What every host of the samplers shares: the names that it lists, which calibration a run takes, how a model
is measured, and what a run tells. Read library first. The hosts are nodes/ (ComfyUI) and webui/."""
