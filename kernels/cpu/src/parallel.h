// Splits work over threads and lends each thread scratch memory. Knows no operation.
#pragma once

#include <cstddef>

#include "level.h"

namespace pilotlight {

using Task = void (*)(void* context, i64 begin, i64 end);

// Runs `task` over [0, count) in pieces of at most `grain`, this thread included, and returns when
// all are done. Which thread runs a piece is open, so results must not depend on it.
void parallel_for(i64 count, i64 grain, Task task, void* context);

// This thread's own memory, aligned to 64 bytes, until its next call; null when there is none.
void* scratch(std::size_t num_bytes);

// Another such, for what a caller of parallel_for prepares for all its threads.
void* shared_scratch(std::size_t num_bytes);

// Asks for large pages where `memory` is about to be written for the first time: its page faults
// would take longer than the writing.
void expect_large_pages(void* memory, std::size_t num_bytes);

void set_num_threads(int num_threads);
int num_threads();

}  // namespace pilotlight
