/// Registers "DkmXnnpackBackend": XNNPACK, with weights that are palettized in the file.
///
/// A program for it is one for XNNPACK, except that a weight which XNNPACK knows as `key` may be
/// stored under "dkm.lut:" + key as a LUT blob (see lut_blob.h). The dense weight exists only while
/// XNNPACK packs it, and has the same bytes that XNNPACK would have found under `key`.

#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/core/named_data_map.h>
#include <executorch/runtime/platform/log.h>

#include <cstring>
#include <new>
#include <string>
#include <string_view>

#include "dense_memory.h"
#include "lut_blob.h"

namespace dkm {
namespace {

namespace et = executorch::runtime;

constexpr char kBackendName[] = "DkmXnnpackBackend";
constexpr char kXnnpackName[] = "XnnpackBackend";
constexpr std::string_view kLutPrefix = "dkm.lut:";

/// Of what a delegate's dense weights need in all, as an unsigned number of 64 bits.
constexpr char kDenseBytesSpec[] = "dkm.dense_bytes";

std::size_t expected_bytes(et::ArrayRef<et::CompileSpec> compile_specs) noexcept {
  std::uint64_t bytes = 0;
  for (const et::CompileSpec& spec : compile_specs) {
    if (std::strcmp(spec.key, kDenseBytesSpec) == 0 && spec.value.nbytes == sizeof(bytes)) {
      std::memcpy(&bytes, spec.value.buffer, sizeof(bytes));
    }
  }
  return static_cast<std::size_t>(bytes);
}

/// A program's named data, where LUT blobs look like the dense weights that they hold.
class LutDataMap final : public et::NamedDataMap {
 public:
  /// `stored` outlives this and may be null, as in a program without named data.
  LutDataMap(const et::NamedDataMap* stored, std::size_t expected_bytes) noexcept
      : stored_(stored), memory_(expected_bytes) {}

  et::Result<et::FreeableBuffer> get_data(std::string_view key) const override {
    if (stored_ == nullptr) return et::Error::NotFound;
    auto stored = stored_->get_data(lut_key(key));
    if (stored.error() == et::Error::NotFound) return stored_->get_data(key);
    if (!stored.ok()) return stored.error();

    LutBlob blob;
    ET_CHECK_OK_OR_RETURN_ERROR(parse_blob(key, *stored, blob));
    const std::size_t bytes = expanded_size(blob);
    const DenseMemory::Piece piece = memory_.take(bytes);
    if (piece.data == nullptr) return refused(key, LutError::kNoMemory);
    et::FreeableBuffer dense(piece.data, bytes, DenseMemory::release, piece.context);
    ET_CHECK_OK_OR_RETURN_ERROR(expand_blob(key, blob, piece.data));
    return dense;
  }

  et::Error load_data_into(std::string_view key, void* buffer, std::size_t size) const override {
    if (stored_ == nullptr) return et::Error::NotFound;
    auto stored = stored_->get_data(lut_key(key));
    if (stored.error() == et::Error::NotFound) return stored_->load_data_into(key, buffer, size);
    if (!stored.ok()) return stored.error();

    LutBlob blob;
    ET_CHECK_OK_OR_RETURN_ERROR(parse_blob(key, *stored, blob));
    if (size != expanded_size(blob)) return refused(key, LutError::kOutputSize);
    if (reinterpret_cast<std::uintptr_t>(buffer) % alignof(float) != 0) {
      return refused(key, LutError::kOutputUnaligned);
    }
    return expand_blob(key, blob, buffer);
  }

  /// A blob does not know the shape that its consumer gives to the dense weight.
  et::Result<const et::TensorLayout> get_tensor_layout(std::string_view key) const override {
    if (stored_ == nullptr) return et::Error::NotFound;
    return stored_->get_tensor_layout(key);
  }

  /// The weights that were asked for so far are all for now.
  void finish() noexcept { memory_.finish(); }

  et::Result<std::uint32_t> get_num_keys() const override {
    if (stored_ == nullptr) return std::uint32_t{0};
    return stored_->get_num_keys();
  }

  et::Result<const char*> get_key(std::uint32_t index) const override {
    if (stored_ == nullptr) return et::Error::InvalidArgument;
    return stored_->get_key(index);
  }

 private:
  static std::string lut_key(std::string_view key) { return std::string(kLutPrefix).append(key); }

  static et::Error refused(std::string_view key, LutError error) {
    ET_LOG(Error, "%s: palettized weight %.*s: %s", kBackendName, static_cast<int>(key.size()),
           key.data(), describe(error));
    switch (error) {
      case LutError::kNoMemory:
        return et::Error::MemoryAllocationFailed;
      case LutError::kOutputSize:
      case LutError::kOutputUnaligned:
        return et::Error::InvalidArgument;
      default:
        return et::Error::InvalidExternalData;
    }
  }

  static et::Error parse_blob(std::string_view key, const et::FreeableBuffer& stored,
                              LutBlob& blob) {
    const LutError error = parse(stored.data(), stored.size(), blob);
    return error == LutError::kOk ? et::Error::Ok : refused(key, error);
  }

  static et::Error expand_blob(std::string_view key, const LutBlob& blob, void* dense) {
    const LutError error = expand(blob, dense);
    return error == LutError::kOk ? et::Error::Ok : refused(key, error);
  }

  const et::NamedDataMap* stored_;
  // XNNPACK asks through a map that it may not change.
  mutable DenseMemory memory_;
};

/// What `init` returns. It lies in the method's own memory, like XNNPACK's handle.
struct Handle {
  Handle(const et::NamedDataMap* stored, std::size_t expected_bytes) noexcept
      : data(stored, expected_bytes) {}

  // XNNPACK asks for data in `init` alone, but its weight cache keeps a pointer to the map.
  LutDataMap data;
  et::BackendInterface* xnnpack = nullptr;
  et::DelegateHandle* xnnpack_handle = nullptr;
};

class LutBackend final : public et::BackendInterface {
 public:
  // Whether there is an XNNPACK is said by `init`, which can also say what is missing.
  bool is_available() const override {
    const et::BackendInterface* xnnpack = find_xnnpack();
    return xnnpack == nullptr || xnnpack->is_available();
  }

  et::Result<et::DelegateHandle*> init(et::BackendInitContext& context,
                                       et::FreeableBuffer* processed,
                                       et::ArrayRef<et::CompileSpec> compile_specs) const override {
    et::BackendInterface* xnnpack = find_xnnpack();
    if (xnnpack == nullptr) {
      ET_LOG(Error, "%s needs %s, which is not linked into this program", kBackendName,
             kXnnpackName);
      return et::Error::NotFound;
    }
    void* memory = context.get_runtime_allocator()->allocate(sizeof(Handle), alignof(Handle));
    if (memory == nullptr) return et::Error::MemoryAllocationFailed;
    auto* handle = new (memory) Handle(context.get_named_data_map(), expected_bytes(compile_specs));
    handle->xnnpack = xnnpack;
    et::BackendInitContext xnnpack_context(context.get_runtime_allocator(), context.event_tracer(),
                                           context.get_method_name(), &handle->data,
                                           context.runtime_specs());
    auto result = xnnpack->init(xnnpack_context, processed, {});
    handle->data.finish();
    if (!result.ok()) {
      handle->~Handle();
      return result.error();
    }
    handle->xnnpack_handle = *result;
    return handle;
  }

  et::Error execute(et::BackendExecutionContext& context, et::DelegateHandle* handle,
                    et::Span<et::EValue*> args) const override {
    DenseMemory::forget();  // all delegates are loaded
    auto* ours = static_cast<Handle*>(handle);
    return ours->xnnpack->execute(context, ours->xnnpack_handle, args);
  }

  void destroy(et::DelegateHandle* handle) const override {
    if (handle == nullptr) return;  // after an `init` that failed
    auto* ours = static_cast<Handle*>(handle);
    ours->xnnpack->destroy(ours->xnnpack_handle);
    DenseMemory::forget();
    ours->~Handle();
  }

  et::Error set_option(et::BackendOptionContext& context,
                       const et::Span<et::BackendOption>& options) override {
    et::BackendInterface* xnnpack = find_xnnpack();
    return xnnpack == nullptr ? et::Error::NotFound : xnnpack->set_option(context, options);
  }

  et::Error get_option(et::BackendOptionContext& context,
                       et::Span<et::BackendOption>& options) override {
    et::BackendInterface* xnnpack = find_xnnpack();
    return xnnpack == nullptr ? et::Error::NotFound : xnnpack->get_option(context, options);
  }

 private:
  // Looked up when it is needed: static objects of other libraries have no known order.
  static et::BackendInterface* find_xnnpack() { return et::get_backend_class(kXnnpackName); }
};

/// Never destroyed: programs that are static objects may outlive those of this library.
LutBackend& backend() {
  static auto* const instance = new LutBackend;
  return *instance;
}

// A second copy of this library changes nothing: the first one stays registered.
[[maybe_unused]] const et::Error registered = et::register_backend({kBackendName, &backend()});

}  // namespace
}  // namespace dkm
