"""The torch side of the engine: runs a Step and returns a StepResult. Knows no scheduler."""
