#define LEVEL amx
#define LANES 16
#define HAS_BF16_DOT 1
#define HAS_AMX 1
#include "level.inc"
