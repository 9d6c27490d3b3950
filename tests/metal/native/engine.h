// What a translated shader needs from the engine that runs it. Kept light: every shader compiles it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sim {

// Where one GPU thread stands, as Metal's attributes of these names give it.
struct Position {
  uint32_t thread_position_in_grid[3];
  uint32_t thread_position_in_threadgroup[3];
};

// Runs a kernel's body for one thread; `arguments` are its buffers and scalars, in order, then their element counts.
using Body = void (*)(void* const* arguments, const long* counts, const Position&);

// Where in a shader a barrier or simdgroup operation stands. Torch's own headers let part of a simdgroup do the second
// stage of a reduction, which Metal allows (the others are inactive); in a kernel's own text it is taken for a mistake.
struct Site {
  unsigned line;
  const char* function;
};

// What the lanes of one simdgroup published in one simdgroup operation.
struct Lanes {
  uint32_t active;  // bit l: lane l took part
  unsigned own;     // the calling thread's lane
  const unsigned char (*values)[16];
};

// All of these throw what launch() reports.
[[noreturn]] void fail_index(const char* buffer, long index, long count);
void barrier(Site site);
Lanes exchange(const void* value, size_t size, Site site);
void* group_memory(size_t bytes, const char* name);

}  // namespace sim

// Runs `body` over a grid: `grid` threads per axis in groups of `group` (all zero: no group, hence no barriers, no
// simdgroups, no group memory). Order 0 runs groups, simdgroups and lanes ascending, order 1 descending.
// Returns 0, or 1 with a message in `error`. Safe to call from several threads at once.
extern "C" int sim_launch(sim::Body body, void* const* arguments, const long* counts, const uint32_t* grid,
                          const uint32_t* group, int order, char* error, size_t error_size);
