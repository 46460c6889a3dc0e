#define LEVEL avx512
#define LANES 16
#define HAS_BF16_DOT 0
#define HAS_AMX 0
#include "level.inc"
