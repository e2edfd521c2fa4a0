// A CUDA device that is not there. Its tensors lie in host memory, and each of its operators is the CPU's on the same
// bytes. What CUDA refuses raises: tensors of two devices, a generator of the CPU. Operations for which Python would
// wait for the GPU are counted. Streams, events and guards do nothing.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/TensorUtils.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

using namespace at;

namespace {

// ------------------------------------------------------------------------------------------------ the device and memory

const Device GPU(kCUDA, 0);

struct Guard : c10::impl::NoOpDeviceGuardImpl<kCUDA> {
  static Stream stream() { return Stream(Stream::DEFAULT, GPU); }
  Device exchangeDevice(Device) const override { return GPU; }
  Device getDevice() const override { return GPU; }
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream getNewStream(Device, int) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}
};
c10::impl::DeviceGuardImplRegistrar guard(kCUDA, new Guard());

struct Memory final : Allocator {
  DataPtr allocate(size_t bytes) override {
    auto* host = new DataPtr(c10::GetCPUAllocator()->allocate(bytes));
    if (bytes) memset(host->get(), 0, bytes);  // what a kernel of Triton, which is not run, would have written
    return {host->get(), host, [](void* held) { delete static_cast<DataPtr*>(held); }, GPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} memory;

struct RandomNumbers : CPUGeneratorImpl {
  RandomNumbers() { device_ = GPU; }
  void move_to(Device device) { device_ = device; }
};

struct Hooks : CUDAHooksInterface {
  Hooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void*) const override { return false; }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  Generator getNewGenerator(DeviceIndex) const override { return make_generator<RandomNumbers>(); }
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    static Generator generator = make_generator<RandomNumbers>();
    return generator;
  }
};

// ----------------------------------------------------------------------------------------------------------- operators

std::map<std::string, int64_t> waits;  // operation -> times that the host would have waited for the GPU

// The same bytes as a tensor of the other device; it keeps them alive.
Tensor alias(const Tensor& t, DeviceType type) {
  auto* held = new Storage(t.storage());
  DataPtr data(held->nbytes() ? const_cast<void*>(held->data()) : nullptr, held,
               [](void* kept) { delete static_cast<Storage*>(kept); }, type == kCUDA ? GPU : Device(kCPU));
  Allocator* allocator = type == kCUDA ? &memory : c10::GetCPUAllocator();
  Storage storage(Storage::use_byte_size_t(), held->nbytes(), std::move(data), allocator, true);
  DispatchKeySet keys(type == kCUDA ? DispatchKey::CUDA : DispatchKey::CPU);
  auto made = at::detail::make_tensor<TensorImpl>(std::move(storage), keys, t.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return made;
}

// Call `change` for every tensor in a value of the stack, and put what it returns in its place.
template <class Change>
void replace_tensors(IValue& value, Change change) {
  if (value.isTensor()) {
    value = change(value.toTensor());
  } else if (value.isTensorList()) {
    c10::List<Tensor> changed;
    for (const Tensor& t : value.toTensorVector()) changed.push_back(change(t));
    value = changed;
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> changed;
    for (const std::optional<Tensor>& t : value.toOptionalTensorVector())
      changed.push_back(t ? std::optional<Tensor>(change(*t)) : std::nullopt);
    value = changed;
  }
}

// Any operator: call the CPU's on aliases of its arguments, and return its results as tensors of the GPU.
void on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string& name = schema.name();
  std::vector<std::pair<Tensor, Tensor>> pairs;  // host alias, tensor of the GPU
  bool host = false;
  RandomNumbers* generator = nullptr;
  auto to_host = [&](const Tensor& t) {
    if (!t.defined() || !t.is_cuda()) {
      host = host || (t.defined() && t.dim() > 0);  // CUDA takes numbers from the host
      return t;
    }
    pairs.emplace_back(alias(t, kCPU), t);
    return pairs.back().first;
  };
  const auto arguments = stack->size() - schema.arguments().size();
  for (auto i = arguments; i < stack->size(); i++) {
    IValue& value = (*stack)[i];
    replace_tensors(value, to_host);
    if (value.isDevice() && value.toDevice().is_cuda()) value = Device(kCPU);
    if (value.isGenerator()) {
      TORCH_CHECK(value.toGenerator().device().is_cuda(), name, ": expected a generator on cuda, not on cpu");
      generator = static_cast<RandomNumbers*>(value.toGenerator().unsafeGetGeneratorImpl());
      generator->move_to(kCPU);
    }
  }
  const bool indexing = name == "aten::index" || name == "aten::_index_put_impl_";  // CUDA copies indices of the host
  TORCH_CHECK(pairs.empty() || !host || indexing, name, ": tensors on cuda:0 and cpu");
  if (indexing && host) waits[name]++;
  if (name == "aten::nonzero" || name == "aten::masked_select" || name == "aten::_unique2") waits[name]++;
  op.callBoxed(stack);
  if (generator) generator->move_to(GPU);
  auto to_gpu = [&](const Tensor& t) {
    if (!t.defined() || t.is_cuda()) return t;
    for (auto& [cpu, gpu] : pairs)
      if (cpu.is_same(t)) {
        if (!gpu.sizes().equals(t.sizes())) {  // out= was resized
          gpu.unsafeGetTensorImpl()->set_storage_keep_dtype(alias(t, kCUDA).storage());
          gpu.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
        }
        return gpu;
      }
    return alias(t, kCUDA);
  };
  for (auto i = stack->size() - schema.returns().size(); i < stack->size(); i++) replace_tensors((*stack)[i], to_gpu);
}

Tensor empty(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device>,
             std::optional<bool>, std::optional<MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, DispatchKeySet(DispatchKey::CUDA), dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>,
                     std::optional<Device>, std::optional<bool>) {
  DispatchKeySet keys(DispatchKey::CUDA);
  return at::detail::empty_strided_generic(size, stride, &memory, keys, dtype_or_default(dtype));
}

Tensor as_strided(const Tensor& t, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
  auto view = at::detail::make_tensor<TensorImpl>(TensorImpl::VIEW, Storage(t.storage()), t.key_set(), t.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset.value_or(t.storage_offset()));
  return view;
}

Tensor reshape_alias(const Tensor& t, IntArrayRef size, IntArrayRef stride) {
  return as_strided(t, size, stride, std::nullopt);
}

Tensor view(const Tensor& t, IntArrayRef size) {
  auto inferred = at::infer_size_dv(size, t.numel());
  auto stride = at::detail::computeStride(t.sizes(), t.strides(), inferred);
  TORCH_CHECK(stride.has_value(), "view: the memory of the tensor does not allow this shape");
  return as_strided(t, inferred, *stride, std::nullopt);
}

Tensor& set_part(Tensor& t, Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  t.unsafeGetTensorImpl()->set_storage_keep_dtype(storage);
  t.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return t;
}

Tensor& set_all(Tensor& t, Storage storage) {
  return set_part(t, storage, 0, {static_cast<int64_t>(storage.nbytes() / t.itemsize())}, {1});
}

const Tensor& resize_(const Tensor& t, IntArrayRef size, std::optional<MemoryFormat>) {
  auto made = empty(size, t.scalar_type(), {}, {}, {}, {});
  t.unsafeGetTensorImpl()->set_storage_keep_dtype(made.storage());
  t.unsafeGetTensorImpl()->set_sizes_and_strides(made.sizes(), made.strides(), 0);
  return t;
}

Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  if (to.is_cuda() != from.is_cuda() && !non_blocking) waits[to.is_cuda() ? "copy to the GPU" : "copy from the GPU"]++;
  auto here = [](const Tensor& t) { return t.is_cuda() ? alias(t, kCPU) : t; };
  here(to).copy_(here(from));
  return to;
}

Tensor& addmm_float32(const Tensor& t, const Tensor& a, const Tensor& b, ScalarType dtype, const Scalar& beta,
                      const Scalar& alpha, Tensor& out) {  // 16-bit factors, float32 sum: CUDA only
  auto sum = alias(out, kCPU);
  at::addmm_out(sum, alias(t, kCPU), alias(a, kCPU).to(dtype), alias(b, kCPU).to(dtype), beta, alpha);
  return out;
}

Scalar item(const Tensor& t) {
  waits["item"]++;
  return at::_local_scalar_dense(alias(t, kCPU));
}

}  // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("as_strided", TORCH_FN(as_strided));
  m.impl("_reshape_alias", TORCH_FN(reshape_alias));
  m.impl("view", TORCH_FN(view));
  m.impl("resize_", TORCH_FN(resize_));
  m.impl("set_.source_Storage", TORCH_FN(set_all));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_part));
  m.impl("addmm.dtype_out", TORCH_FN(addmm_float32));
  m.impl("copy_", TORCH_FN(copy_));
  m.impl("_local_scalar_dense", TORCH_FN(item));
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>()); }

// Operations for which the host would have waited since the last call, sorted, each as often as it happened.
TORCH_LIBRARY(fake_cuda, m) {
  m.def("waits() -> str[]", [] {
    c10::List<std::string> names;
    for (auto& [name, count] : waits)
      for (int64_t i = 0; i < count; i++) names.push_back(name);
    waits.clear();
    return names;
  });
}
