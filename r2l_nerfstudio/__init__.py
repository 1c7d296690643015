"""R2L and MobileR2L for Nerfstudio: any trained model, distilled into a neural light field."""
