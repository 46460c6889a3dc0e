#define LEVEL avx2
#define LANES 8
#define HAS_BF16_DOT 0
#define HAS_AMX 0
#include "level.inc"
