#define LEVEL generic
#define LANES 4
#define HAS_BF16_DOT 0
#include "level.inc"
