/* The device behind the column: errors, memory for a call, and what is known of the GPU. */
#include <cstdlib>
#include <cstring>
#include <new>

#include "cuda/device.cuh"

namespace lmi {

namespace {
Architecture allowed = Architecture::kSm90a;
}

void allow_architecture(Architecture most) { allowed = most; }

#if defined(LMI_SIM)

int num_processors() { return 3; }

bool has_sm90a() { return allowed == Architecture::kSm90a; }

Scratch::Scratch(size_t num_bytes, cudaStream_t stream) : data_(std::malloc(num_bytes + 1)), stream_(stream) {
  if (!data_) throw std::bad_alloc();
  std::memset(data_, 0xff, num_bytes);
}

Scratch::~Scratch() { std::free(data_); }

#else

void check_cuda(cudaError_t error, const char *what) {
  if (error != cudaSuccess) throw Error(LMI_DEVICE_ERROR, std::string(what) + ": " + cudaGetErrorString(error));
}

int num_processors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

bool has_sm90a() {
  if (allowed != Architecture::kSm90a || !std::strstr(LMI_ARCHITECTURES, "90a")) return false;
  int device = 0, major = 0, minor = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  return major == 9 && minor == 0;
}

Scratch::Scratch(size_t num_bytes, cudaStream_t stream) : stream_(stream) {
  if (num_bytes > 0) {
    check_cuda(cudaMallocAsync(&data_, num_bytes, stream), (std::to_string(num_bytes) + " bytes for scratch").c_str());
  }
}

Scratch::~Scratch() {
  if (data_) cudaFreeAsync(data_, stream_);
}

#endif

}  // namespace lmi
