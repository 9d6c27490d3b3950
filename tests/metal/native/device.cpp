// An "mps" device whose memory is host memory, for a torch that was built without MPS.
//
// Torch's own front end stays as it is: the device is registered where Apple's would be (allocator, device guard,
// hooks, dispatch keys), so that torch.mps, torch.accelerator, generators and factories work unmodified. Operators run
// as the CPU's, are counted by name, and are refused unless torch has an MPS kernel for them.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Tensor.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <set>
#include <sstream>
#include <string>
#include <utility>

namespace {

const c10::Device kDevice(c10::DeviceType::MPS, 0);
constexpr size_t kRecommendedMemory = size_t(16) << 30;  // what a Mac with some 21 GB would answer

// The library stays loaded; the device is there only while a test asks for it.
std::atomic<bool> installed{false};

// ---- memory

struct Block {  // what a DataPtr owns
  void* data;
  size_t bytes;
};

class Allocator final : public c10::DeviceAllocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    TORCH_CHECK(installed, "no mps device: the simulated one is not installed");
    {
      std::lock_guard lock(mutex_);
      TORCH_CHECK_WITH(OutOfMemoryError, limit_ == 0 || size_t(bytes_.current) + bytes <= limit_,
                       "MPS backend out of memory (MPS allocated: ", bytes_.current, " bytes, max allowed: ", limit_,
                       " bytes). Tried to allocate ", bytes, " bytes on the simulated device.");
      bytes_.increase(bytes);
      driver_bytes_ = std::max(driver_bytes_, size_t(bytes_.current));
    }
    void* data = bytes ? c10::alloc_cpu(bytes) : nullptr;
    if (data) std::memset(data, 0xff, bytes);  // NaN: what nobody wrote shows
    return {data, new Block{data, bytes}, &release, kDevice};
  }
  // No raw deleter: the context of a DataPtr is not its data.
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {
    std::lock_guard lock(mutex_);
    driver_bytes_ = size_t(bytes_.current);
  }
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    std::lock_guard lock(mutex_);
    c10::CachingDeviceAllocator::DeviceStats stats;
    stats.allocated_bytes[0] = stats.active_bytes[0] = stats.requested_bytes[0] = bytes_;
    stats.reserved_bytes[0].current = stats.reserved_bytes[0].peak = int64_t(driver_bytes_);
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {
    std::lock_guard lock(mutex_);
    bytes_.reset_accumulated();
  }
  void resetPeakStats(c10::DeviceIndex) override {
    std::lock_guard lock(mutex_);
    bytes_.reset_peak();
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    return {kRecommendedMemory - std::min(kRecommendedMemory, allocated()), kRecommendedMemory};
  }

  size_t allocated() const {
    std::lock_guard lock(mutex_);
    return size_t(bytes_.current);
  }
  size_t driver() const {
    std::lock_guard lock(mutex_);
    return driver_bytes_;
  }
  void set_limit(size_t bytes) {
    std::lock_guard lock(mutex_);
    limit_ = bytes;
  }

 private:
  static void release(void* context);

  mutable std::mutex mutex_;
  c10::CachingAllocator::Stat bytes_;
  size_t driver_bytes_ = 0;  // as a caching allocator's: grows to the peak, shrinks when the cache is emptied
  size_t limit_ = 0;         // 0: none
} allocator;

void Allocator::release(void* context) {
  Block* block = static_cast<Block*>(context);
  c10::free_cpu(block->data);
  std::lock_guard lock(allocator.mutex_);
  allocator.bytes_.decrease(block->bytes);
  delete block;
}

REGISTER_ALLOCATOR(c10::DeviceType::MPS, &allocator)

// Host memory that answers yes to is_pinned().
class PinnedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? c10::alloc_cpu(bytes) : nullptr;
    std::lock_guard lock(mutex_);
    pinned_.insert(data);
    return {data, data, &release, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  bool contains(const void* data) {
    std::lock_guard lock(mutex_);
    return pinned_.count(data) != 0;
  }

 private:
  static void release(void* data);
  std::mutex mutex_;
  std::set<const void*> pinned_;
} pinned_allocator;

void PinnedAllocator::release(void* data) {
  {
    std::lock_guard lock(pinned_allocator.mutex_);
    pinned_allocator.pinned_.erase(data);
  }
  c10::free_cpu(data);
}

// ---- random numbers

// An mps generator that draws as a CPU generator does: the numbers are the CPU's, not Apple's.
class Generator final : public c10::GeneratorImpl {
 public:
  explicit Generator(at::Generator cpu = at::detail::createCPUGenerator())
      : c10::GeneratorImpl(kDevice, c10::DispatchKeySet(c10::DispatchKey::MPS)), cpu_(std::move(cpu)) {}
  const at::Generator& cpu() const { return cpu_; }

  void set_current_seed(uint64_t seed) override { cpu_.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { cpu_.set_offset(offset); }
  uint64_t get_offset() const override { return cpu_.unsafeGetGeneratorImpl()->get_offset(); }
  uint64_t current_seed() const override { return cpu_.current_seed(); }
  uint64_t seed() override { return cpu_.seed(); }
  void set_state(const c10::TensorImpl& state) override { cpu_.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu_.unsafeGetGeneratorImpl()->get_state(); }

 private:
  Generator* clone_impl() const override { return new Generator(cpu_.clone()); }
  at::Generator cpu_;
};

const at::Generator& default_generator() {
  static const at::Generator generator = at::make_generator<Generator>();
  return generator;
}

// ---- hooks and guard: what torch.mps and torch.accelerator ask

class Events {
 public:
  uint32_t acquire() {
    std::lock_guard lock(mutex_);
    times_.emplace(++last_, Clock::time_point{});
    return last_;
  }
  void release(uint32_t id) {
    std::lock_guard lock(mutex_);
    times_.erase(id);
  }
  void record(uint32_t id) {
    std::lock_guard lock(mutex_);
    times_.at(id) = Clock::now();
  }
  double elapsed_ms(uint32_t from, uint32_t to) {
    std::lock_guard lock(mutex_);
    return std::chrono::duration<double, std::milli>(times_.at(to) - times_.at(from)).count();
  }

 private:
  using Clock = std::chrono::steady_clock;
  std::mutex mutex_;
  std::map<uint32_t, Clock::time_point> times_;
  uint32_t last_ = 0;
} events;

struct Hooks final : at::MPSHooksInterface {
  void init() const override {}
  bool hasMPS() const override { return installed; }
  bool isBuilt() const override { return installed; }
  bool isAvailable() const override { return installed; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return installed; }
  c10::DeviceIndex deviceCount() const override { return installed ? 1 : 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  bool isOnMacOSorNewer(unsigned major, unsigned minor) const override { return major < 15 || (major == 15 && minor == 0); }
  c10::Device getDeviceFromPtr(void*) const override { return kDevice; }

  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }

  void deviceSynchronize() const override {}  // every launch has ended when it returns
  void commitStream() const override {}
  c10::Allocator* getMPSDeviceAllocator() const override { return &allocator; }
  void emptyCache() const override { allocator.emptyCache({0, 0}); }
  size_t getCurrentAllocatedMemory() const override { return allocator.allocated(); }
  size_t getDriverAllocatedMemory() const override { return allocator.driver(); }
  size_t getRecommendedMaxMemory() const override { return kRecommendedMemory; }
  size_t getMaxBufferLength() const override { return kRecommendedMemory / 2; }
  void setMemoryFraction(double fraction) const override { allocator.set_limit(size_t(fraction * double(kRecommendedMemory))); }
  bool isPinnedPtr(const void* data) const override { return pinned_allocator.contains(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }

  uint32_t acquireEvent(bool) const override { return events.acquire(); }
  void releaseEvent(uint32_t id) const override { events.release(id); }
  void recordEvent(uint32_t id) const override { events.record(id); }
  void waitForEvent(uint32_t) const override {}
  void synchronizeEvent(uint32_t) const override {}
  bool queryEvent(uint32_t) const override { return true; }
  double elapsedTimeOfEvents(uint32_t from, uint32_t to) const override { return events.elapsed_ms(from, to); }
};

// Torch makes its hooks at the first question and keeps them, and by now somebody may have asked: so ours take the
// place of the object itself. Both are without members.
void replace_hooks() {
  static_assert(sizeof(Hooks) == sizeof(at::MPSHooksInterface));
  new (const_cast<at::MPSHooksInterface*>(&at::detail::getMPSHooks())) Hooks;
}

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::MPS> {
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }  // mps has one, as Apple's guard says
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return installed ? 1 : 0; }
  void synchronizeDevice(const c10::DeviceIndex) const override {}

 private:
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
};
C10_REGISTER_GUARD_IMPL(MPS, Guard)

// ---- operators

const c10::DispatchKeySet kKeys(c10::DispatchKey::MPS);

void check_dtype(c10::ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype != c10::kDouble && dtype != c10::kComplexDouble,
                   "Cannot convert a MPS Tensor to ", dtype, " dtype as the MPS framework doesn't support float64.");
}

at::Tensor empty(at::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  check_dtype(c10::dtype_or_default(dtype));
  return at::detail::empty_generic(size, &allocator, kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  check_dtype(c10::dtype_or_default(dtype));
  return at::detail::empty_strided_generic(size, stride, &allocator, kKeys, c10::dtype_or_default(dtype));
}

// The same memory as a CPU tensor.
at::Tensor on_cpu(const at::Tensor& t) {
  return t.is_cpu() ? t : at::from_blob(t.data_ptr(), t.sizes(), t.strides(), t.options().device(at::kCPU));
}

// Bytes that a program moved; what run_on_cpu() below moves is not the program's doing.
std::atomic<long> bytes_to_device{0}, bytes_to_host{0};
thread_local bool inside_operator = false;

void copy(const at::Tensor& from, const at::Tensor& to) {
  if (from.is_cpu() != to.is_cpu() && !inside_operator) (to.is_cpu() ? bytes_to_host : bytes_to_device) += long(from.nbytes());
  on_cpu(to).copy_(on_cpu(from));
}

at::Tensor& copy_(at::Tensor& to, const at::Tensor& from, bool) {
  copy(from, to);
  return to;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  copy(from, to);
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

// Which operators torch has MPS kernels for, from its own table; how often each ran.
class Operators {
 public:
  void allow(const std::string& names) {
    std::lock_guard lock(mutex_);
    std::istringstream lines(names);
    for (std::string name; std::getline(lines, name);) known_.insert(name);
  }
  void count(const std::string& name) {
    std::lock_guard lock(mutex_);
    TORCH_CHECK_NOT_IMPLEMENTED(known_.count(name), "The operator '", name,
                                "' is not currently implemented for the MPS device: this torch has no MPS kernel for it, "
                                "so the simulated device has none either.");
    counts_[name]++;
  }
  std::string counts() {
    std::lock_guard lock(mutex_);
    std::ostringstream lines;
    for (const auto& [name, count] : counts_) lines << name << '\t' << count << '\n';
    return lines.str();
  }
  void reset() {
    std::lock_guard lock(mutex_);
    counts_.clear();
  }

 private:
  std::mutex mutex_;
  std::set<std::string> known_;
  std::map<std::string, long> counts_;
} operators;

bool takes_generator(const c10::Argument& argument) {
  const auto type = argument.type();
  if (type->kind() == c10::TypeKind::GeneratorType) return true;
  const auto optional = type->cast<c10::OptionalType>();
  return optional && optional->getElementType()->kind() == c10::TypeKind::GeneratorType;
}

// As Apple's device: every tensor on it, but for CPU scalars. (Indices in a list may be on either; they are no Tensor[].)
void check_devices(const std::string& name, const c10::Argument& argument, const at::Tensor& t) {
  if (!t.defined() || t.is_mps() || (t.is_cpu() && t.dim() == 0)) return;
  TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, mps:0 and ",
              t.device(), "! (argument ", argument.name(), " of ", name, ")");
}

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string name = c10::toString(op.operator_name());
  operators.count(name);
  const auto& arguments = op.schema().arguments();
  const size_t first = stack->size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); i++) {
    c10::IValue& value = (*stack)[first + i];
    if (value.isTensor()) {
      check_devices(name, arguments[i], value.toTensor());
    } else if (value.isTensorList()) {
      for (const at::Tensor& t : value.toTensorVector()) check_devices(name, arguments[i], t);
    } else if (takes_generator(arguments[i])) {
      at::Generator generator = value.isNone() ? default_generator() : value.toGenerator();
      TORCH_CHECK(generator.device().is_mps(), "Expected a 'mps' device type for generator but found '",
                  generator.device(), "'");
      value = static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->cpu();
    }
  }
  struct Inside {
    bool before = std::exchange(inside_operator, true);
    ~Inside() { inside_operator = before; }
  } inside;
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

TORCH_LIBRARY_IMPL(_, MPS, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, MPS, m) {
  // Memory, and views of it: these must not go over the CPU's memory.
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("resize_", at::native::resize_);
  m.impl("set_", at::native::set_cpu_);
  m.impl("set_.source_Storage", static_cast<at::Tensor& (*)(at::Tensor&, at::Storage)>(at::native::set_));
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("unfold", at::native::unfold);
  m.impl("_reshape_alias", at::native::_reshape_alias);
}

}  // namespace

// ---- what simulator.py calls

extern "C" {

void sim_device_allow_operators(const char* names) { operators.allow(names); }

void sim_device_install(int present) {
  replace_hooks();
  installed = present != 0;
}

void sim_device_reset_counts() {
  operators.reset();
  bytes_to_device = bytes_to_host = 0;
}

void sim_device_bytes_moved(long* to_device_and_host) {
  to_device_and_host[0] = bytes_to_device;
  to_device_and_host[1] = bytes_to_host;
}

// "name<tab>count" lines; the text lives until this thread asks again.
const char* sim_device_operator_counts() {
  thread_local std::string text;
  text = operators.counts();
  return text.c_str();
}

}  // extern "C"
