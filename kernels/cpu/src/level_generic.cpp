#define LEVEL generic
#define LANES 4
#define HAS_BF16_DOT 0
#define HAS_AMX 0
#include "level.inc"
