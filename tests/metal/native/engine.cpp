// Runs GPU threads on one CPU thread, with Metal's rules checked.
//
// A threadgroup's threads are fibers: each runs until it meets a barrier or a simdgroup operation, and the scheduler
// below then decides who goes on. Thus a kernel is deterministic for an order, and whatever waits in the wrong place
// is seen. Kernels that are launched without groups are a plain loop.
#include "engine.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace sim {
namespace {

constexpr unsigned kLanes = 32;                // threads of a simdgroup
constexpr size_t kMaxGroupMemory = 32 * 1024;  // bytes a threadgroup may declare
constexpr size_t kRedZone = 64;                // poisoned bytes after every array in group memory
constexpr size_t kArena = 2 * kMaxGroupMemory + kRedZone;
constexpr size_t kStack = 64 * 1024;
constexpr unsigned char kPoison = 0xff;        // NaN as a float, -1 as an integer

enum class State { ready, in_exchange, at_barrier, done };

struct Fiber {
  ucontext_t entry;    // used once, to get onto the fiber's own stack
  jmp_buf resume;      // then setjmp and longjmp: swapcontext would cost two system calls a switch
  bool started = false;
  State state = State::done;
  Site site{};         // where it waits
  Position position{};
  size_t arrays = 0;   // how many group arrays it has declared so far
  alignas(16) unsigned char value[16];
};

struct GroupArray {
  size_t offset, bytes;
  std::string name;
};

std::string where(const Site& site) {
  return std::string(" (") + site.function + ", line " + std::to_string(site.line) + " of the translated shader)";
}

bool in_torch_header(const Site& site) {
  return std::strstr(site.function, "c10::metal::simd_") || std::strstr(site.function, "c10::metal::threadgroup_");
}

// The threads of one threadgroup. One object a CPU thread, used for one group after another.
class Group {
 public:
  ~Group() { if (stacks_) munmap(stacks_, fibers_.size() * kStack); }

  void run(Body body, void* const* arguments, const long* counts, const std::vector<Position>& threads, int order);

  // Called on a fiber.
  void wait(State state, Site site) {
    running_->site = site;
    switch_out(state);
  }
  Lanes exchange(const void* value, size_t size, Site site) {
    if (size > sizeof running_->value) throw std::logic_error("simdgroup operation on a type of more than 16 bytes");
    std::memcpy(running_->value, value, size);
    wait(State::in_exchange, site);
    return {active_, lane_of(running_), published_};
  }
  void* group_memory(size_t bytes, const char* name);
  [[noreturn]] void fiber_main();

 private:
  void reserve(size_t threads);
  [[gnu::noinline]] void switch_in(Fiber& fiber);
  [[gnu::noinline]] void switch_out(State state);
  void run_simdgroup(size_t first, size_t end, int order);
  void check_group_memory() const;
  unsigned lane_of(const Fiber* fiber) const { return unsigned(fiber - fibers_.data()) % kLanes; }
  [[noreturn]] void abandon(const std::string& message);

  std::vector<Fiber> fibers_;
  char* stacks_ = nullptr;
  jmp_buf scheduler_;
  Fiber* running_ = nullptr;
  Body body_ = nullptr;
  void* const* arguments_ = nullptr;
  const long* counts_ = nullptr;
  std::string error_;  // what a fiber threw

  uint32_t active_ = 0;  // of the simdgroup that runs: who takes part in the operation just completed, and with what
  alignas(16) unsigned char published_[kLanes][16];
  std::vector<GroupArray> arrays_;
  size_t group_bytes_ = 0;
  alignas(64) unsigned char arena_[kArena];
};

thread_local Group* current = nullptr;  // the group whose fiber is running; null in a launch without groups

void enter_fiber() { current->fiber_main(); }

void Group::fiber_main() {
  for (;;) {
    try {
      body_(arguments_, counts_, running_->position);
    } catch (const std::exception& e) {
      if (error_.empty()) error_ = e.what();
    }
    switch_out(State::done);  // comes back for a thread of the next group
  }
}

void Group::switch_in(Fiber& fiber) {
  running_ = &fiber;
  if (_setjmp(scheduler_) == 0) {
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    setcontext(&fiber.entry);
  }
}

void Group::switch_out(State state) {
  running_->state = state;
  if (_setjmp(running_->resume) == 0) _longjmp(scheduler_, 1);
}

void Group::reserve(size_t threads) {
  if (fibers_.size() < threads) {
    // No fiber of this object is alive here that matters: all have finished their thread.
    if (stacks_) munmap(stacks_, fibers_.size() * kStack);
    fibers_ = std::vector<Fiber>(threads);
    void* stacks = mmap(nullptr, threads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) throw std::runtime_error("no memory for the stacks of a threadgroup");
    stacks_ = static_cast<char*>(stacks);
  }
  for (size_t i = 0; i < threads; i++) {
    Fiber& fiber = fibers_[i];
    if (fiber.started) continue;
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = stacks_ + i * kStack;
    fiber.entry.uc_stack.ss_size = kStack;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, enter_fiber, 0);
  }
}

void Group::abandon(const std::string& message) {
  for (Fiber& fiber : fibers_) fiber.started = false;  // their stacks are in the middle of something: begin anew
  throw std::runtime_error(message);
}

void* Group::group_memory(size_t bytes, const char* name) {
  // Every thread runs the same declarations, so the n-th declaration of each names the same memory.
  size_t index = running_->arrays++;
  if (index == arrays_.size()) {
    size_t offset = arrays_.empty() ? 0 : arrays_.back().offset + arrays_.back().bytes + kRedZone;
    offset = (offset + 15) / 16 * 16;
    arrays_.push_back({offset, bytes, name});
    group_bytes_ += (bytes + 15) / 16 * 16;
    if (group_bytes_ > kMaxGroupMemory)
      throw std::runtime_error("threadgroup memory of " + std::to_string(group_bytes_) + " bytes, Metal allows " +
                               std::to_string(kMaxGroupMemory));
    if (offset + bytes + kRedZone > kArena) throw std::runtime_error("more threadgroup arrays than the simulator has room for");
  }
  return arena_ + arrays_[index].offset;
}

void Group::check_group_memory() const {
  for (const GroupArray& array : arrays_)
    for (size_t i = 0; i < kRedZone; i++)
      if (arena_[array.offset + array.bytes + i] != kPoison)
        throw std::runtime_error("write past the end of threadgroup array " + array.name);
}

// Runs the ready lanes of one simdgroup until all of them wait at a barrier or are done.
void Group::run_simdgroup(size_t first, size_t end, int order) {
  for (;;) {
    for (size_t i = first; i < end; i++) {
      Fiber& fiber = fibers_[order == 0 ? i : first + end - 1 - i];
      if (fiber.state == State::ready) switch_in(fiber);
    }
    if (!error_.empty()) abandon(error_);
    uint32_t active = 0;
    const Site* site = nullptr;
    for (size_t i = first; i < end; i++) {
      const Fiber& fiber = fibers_[i];
      if (fiber.state != State::in_exchange) continue;
      if (site && (site->line != fiber.site.line || std::strcmp(site->function, fiber.site.function) != 0))
        abandon("lanes of one simdgroup wait at different simdgroup operations" + where(*site) + where(fiber.site));
      site = &fiber.site;
      active |= 1u << (i - first);
      std::memcpy(published_[i - first], fiber.value, sizeof fiber.value);
    }
    if (!active) return;
    if (active != (end - first == kLanes ? ~0u : (1u << (end - first)) - 1) && !in_torch_header(*site))
      abandon("simdgroup operation reached by only part of its simdgroup" + where(*site));
    active_ = active;
    for (size_t i = first; i < end; i++)
      if (fibers_[i].state == State::in_exchange) fibers_[i].state = State::ready;
  }
}

void Group::run(Body body, void* const* arguments, const long* counts, const std::vector<Position>& threads, int order) {
  const size_t n = threads.size(), simdgroups = (n + kLanes - 1) / kLanes;
  reserve(n);
  body_ = body, arguments_ = arguments, counts_ = counts;
  error_.clear();
  arrays_.clear();
  group_bytes_ = 0;
  std::memset(arena_, kPoison, sizeof arena_);
  for (size_t i = 0; i < n; i++) {
    fibers_[i].state = State::ready;
    fibers_[i].arrays = 0;
    fibers_[i].position = threads[i];
  }
  for (;;) {
    for (size_t s = 0; s < simdgroups; s++) {
      size_t simdgroup = order == 0 ? s : simdgroups - 1 - s;
      run_simdgroup(simdgroup * kLanes, std::min(n, (simdgroup + 1) * kLanes), order);
    }
    size_t waiting = 0;
    const Site* site = nullptr;
    for (size_t i = 0; i < n; i++) {
      const Fiber& fiber = fibers_[i];
      if (fiber.state != State::at_barrier) continue;
      if (site && (site->line != fiber.site.line || std::strcmp(site->function, fiber.site.function) != 0))
        abandon("threads of one group wait at different barriers" + where(*site) + where(fiber.site));
      site = &fiber.site;
      waiting++;
    }
    if (waiting == 0) break;
    if (waiting != n) abandon("barrier reached by only part of its threadgroup" + where(*site));
    for (size_t i = 0; i < n; i++) fibers_[i].state = State::ready;
  }
  check_group_memory();
}

Group& group_of_this_call(const char* what) {
  if (!current) throw std::runtime_error(std::string(what) + " in a kernel that was launched without group_size");
  return *current;
}

void run_in_groups(Body body, void* const* arguments, const long* counts, const uint32_t* grid, const uint32_t* size,
                   int order) {
  thread_local Group group;  // keeps its fibers for the next launch on this CPU thread
  struct Current {
    explicit Current(Group* g) { current = g; }
    ~Current() { current = nullptr; }
  } scope(&group);
  uint64_t groups[3], total = 1;
  for (int axis = 0; axis < 3; axis++) total *= groups[axis] = (grid[axis] + size[axis] - 1) / size[axis];
  std::vector<Position> threads;
  for (uint64_t k = 0; k < total; k++) {
    uint64_t id = order == 0 ? k : total - 1 - k;
    const uint64_t at[3] = {id % groups[0], id / groups[0] % groups[1], id / groups[0] / groups[1]};
    uint32_t extent[3];  // groups at the grid's edge are smaller
    for (int axis = 0; axis < 3; axis++)
      extent[axis] = uint32_t(std::min<uint64_t>(size[axis], grid[axis] - at[axis] * size[axis]));
    threads.clear();
    for (uint32_t z = 0; z < extent[2]; z++)
      for (uint32_t y = 0; y < extent[1]; y++)
        for (uint32_t x = 0; x < extent[0]; x++)
          threads.push_back({{uint32_t(at[0] * size[0] + x), uint32_t(at[1] * size[1] + y), uint32_t(at[2] * size[2] + z)},
                             {x, y, z}});
    group.run(body, arguments, counts, threads, order);
  }
}

void run_alone(Body body, void* const* arguments, const long* counts, const uint32_t* grid, int order) {
  const uint64_t total = uint64_t(grid[0]) * grid[1] * grid[2];
  for (uint64_t k = 0; k < total; k++) {
    uint64_t id = order == 0 ? k : total - 1 - k;
    body(arguments, counts,
         {{uint32_t(id % grid[0]), uint32_t(id / grid[0] % grid[1]), uint32_t(id / grid[0] / grid[1])}, {0, 0, 0}});
  }
}

}  // namespace

void fail_index(const char* buffer, long index, long count) {
  throw std::out_of_range("out of bounds: " + std::string(buffer) + "[" + std::to_string(index) + "], it has " +
                          std::to_string(count) + " elements");
}

void barrier(Site site) { group_of_this_call("barrier").wait(State::at_barrier, site); }

Lanes exchange(const void* value, size_t size, Site site) {
  return group_of_this_call("simdgroup operation").exchange(value, size, site);
}

void* group_memory(size_t bytes, const char* name) { return group_of_this_call("threadgroup memory").group_memory(bytes, name); }

}  // namespace sim

extern "C" int sim_launch(sim::Body body, void* const* arguments, const long* counts, const uint32_t* grid,
                          const uint32_t* group, int order, char* error, size_t error_size) {
  try {
    if (group[0] == 0)
      sim::run_alone(body, arguments, counts, grid, order);
    else
      sim::run_in_groups(body, arguments, counts, grid, group, order);
  } catch (const std::exception& e) {
    std::snprintf(error, error_size, "%s", e.what());
    return 1;
  }
  return 0;
}
