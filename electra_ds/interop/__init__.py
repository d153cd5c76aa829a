"""Loading of models; conversion from and to Hugging Face and TensorFlow formats."""
