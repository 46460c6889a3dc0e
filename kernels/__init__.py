"""Operations and their implementations. Knows no engine."""
