// A CUDA driver without a device, for tests: it writes down what is called, and fails where it is told to.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>

static std::string written;
static std::map<std::string, int> failures;
static std::map<uintptr_t, uintptr_t> context_of;  // of modules and functions
static uintptr_t modules = 0x100, functions = 0x1000;
static thread_local uintptr_t stack[8];
static thread_local int depth = 0;
static int capture_mode = 0;
static size_t parameter = PARAMETER;

static uintptr_t current() { return depth ? stack[depth - 1] : 0; }
template <class... T> static int say(const char* name, const char* format, T... x) {
    char line[512];
    std::snprintf(line, sizeof line, format, x...);
    written += std::string(name) + " " + line + "\n";
    auto found = failures.find(name);
    return found == failures.end() ? 0 : found->second;
}

extern "C" {
// for the tests
const char* stub_written() { return written.c_str(); }
void stub_clear() { written.clear(); }
void stub_fail(const char* name, int code) { if (code) failures[name] = code; else failures.erase(name); }
void stub_use(uintptr_t context) { depth = 0; if (context) stack[depth++] = context; }
uintptr_t stub_current() { return current(); }

int cuInit(unsigned flags) { return say("cuInit", "%u", flags); }
int cuGetErrorName(int code, const char** out) {
    *out = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : code == 400 ? "CUDA_ERROR_INVALID_HANDLE" : code == 218 ? "CUDA_ERROR_INVALID_PTX"
         : code == 701 ? "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES" : nullptr;
    return *out ? 0 : 1;
}
int cuGetErrorString(int code, const char** out) { *out = code < 1000 ? "what it means" : nullptr; return *out ? 0 : 1; }
int cuDeviceGet(int* out, int ordinal) { *out = 40 + ordinal; return say("cuDeviceGet", "%d", ordinal); }
int cuDevicePrimaryCtxRetain(uintptr_t* out, int device) { *out = 0xc0 + device; return say("cuDevicePrimaryCtxRetain", "%d", device); }
int cuCtxGetCurrent(uintptr_t* out) { *out = current(); return 0; }
int cuCtxPushCurrent_v2(uintptr_t context) { stack[depth++] = context; return say("cuCtxPushCurrent", "%zx", (size_t)context); }
int cuCtxPopCurrent_v2(uintptr_t* out) { *out = current(); --depth; return say("cuCtxPopCurrent", "%zx", (size_t)*out); }
int cuThreadExchangeStreamCaptureMode(int* mode) {
    int old = capture_mode;
    capture_mode = *mode, *mode = old;
    return say("cuThreadExchangeStreamCaptureMode", "%d", capture_mode);
}
int cuModuleLoadDataEx(uintptr_t* out, const char* image, unsigned n, const int* options, void** values) {
    std::map<int, void*> given;
    for (unsigned i = 0; i < n; ++i) given[options[i]] = values[i];
    const bool elf = !std::memcmp(image, "\177ELF", 4);
    if (!elf && std::strstr(image, "wrong")) {
        std::snprintf((char*)given.at(5), (size_t)given.at(6), "ptxas: line 1: wrong");
        return 218;
    }
    context_of[*out = ++modules] = current();
    return say("cuModuleLoadDataEx", "%s in %zx, capture mode %d", elf ? "a cubin" : image, (size_t)current(), capture_mode);
}
int cuModuleGetFunction(uintptr_t* out, uintptr_t module, const char* name) {
    context_of[*out = ++functions] = context_of.at(module);
    return say("cuModuleGetFunction", "%zx %s, capture mode %d", (size_t)module, name, capture_mode);
}
#if PARAMETER
int cuFuncGetParamInfo(uintptr_t, size_t index, size_t* offset, size_t* size) { *offset = 0, *size = parameter; return index != 0; }
#endif
int cuFuncSetAttribute(uintptr_t function, int attribute, int value) {
    return say("cuFuncSetAttribute", "%zx %d %d in %zx", (size_t)function, attribute, value, (size_t)current());
}
int cuLaunchKernel(uintptr_t function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, uintptr_t stream, void** arguments, void** extra) {
    // a kernel of one context is not launched in another
    if (context_of.at(function) != current()) return 201;
    std::string bytes;
    char two[3];
    for (int i = 0; i < 24; ++i) std::snprintf(two, 3, "%02x", ((unsigned char*)arguments[0])[i]), bytes += two;
    return say("cuLaunchKernel", "%zx (%u %u %u) (%u %u %u) %u stream %zx argument %s extra %d in %zx", (size_t)function, gx, gy,
               gz, bx, by, bz, shared, (size_t)stream, bytes.c_str(), extra != nullptr, (size_t)current());
}
}
