"""`pilotlight quantize`: a checkpoint's matrices as GPTQ stores them, rounded or calibrated."""
