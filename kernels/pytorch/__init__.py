"""Operations by kernels that torch itself brings for a device."""
