#define LEVEL avx512_bf16
#define LANES 16
#define HAS_BF16_DOT 1
#define HAS_AMX 0
#include "level.inc"
