// An NVRTC that compiles nothing, for tests: BUILD and ARCHS say which one it is, and $STUB_LOG gets a line for each call of the
// compiler. A source with "wrong" in it does not compile; "breaks" fails otherwise.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

struct Program { std::string source, options, log; };
static const int archs[] = {ARCHS};

static void give(const std::string& text, char* out) { std::memcpy(out, text.c_str(), text.size() + 1); }
static std::string ptx(Program* p) { return "// release, V" BUILD "\n// " + p->options + "\n"; }
static std::string cubin(Program* p) { return std::string("\177ELF") + '\0' + "V" BUILD " " + p->options + p->source; }

extern "C" {
int nvrtcVersion(int* major, int* minor) { return std::sscanf(BUILD, "%d.%d", major, minor) != 2; }
int nvrtcGetNumSupportedArchs(int* n) { *n = sizeof archs / sizeof *archs; return 0; }
int nvrtcGetSupportedArchs(int* out) { std::memcpy(out, archs, sizeof archs); return 0; }
const char* nvrtcGetErrorString(int code) { return code == 6 ? "COMPILATION" : "OTHER"; }
int nvrtcCreateProgram(Program** p, const char* source, const char*, int, void*, void*) {
    *p = new Program{source, "", ""};
    return 0;
}
int nvrtcDestroyProgram(Program** p) { delete *p; *p = nullptr; return 0; }
int nvrtcCompileProgram(Program* p, int n, const char** options) {
    for (int i = 0; i < n; ++i) p->options += std::string(options[i]) + " ";
    if (p->source.empty()) return 0;
    if (const char* path = std::getenv("STUB_LOG")) {
        std::FILE* out = std::fopen(path, "a");
        std::fprintf(out, "%s %s\n", BUILD, p->options.c_str());
        std::fclose(out);
    }
    if (p->source.find("wrong") != std::string::npos) {
        p->log = "attnfuse.cu(1): error: something is wrong";
        return 6;
    }
    return p->source.find("breaks") != std::string::npos ? 7 : 0;
}
int nvrtcGetProgramLogSize(Program* p, size_t* n) { *n = p->log.size() + 1; return 0; }
int nvrtcGetProgramLog(Program* p, char* out) { give(p->log, out); return 0; }
int nvrtcGetPTXSize(Program* p, size_t* n) { *n = ptx(p).size() + 1; return 0; }
int nvrtcGetPTX(Program* p, char* out) { give(ptx(p), out); return 0; }
int nvrtcGetCUBINSize(Program* p, size_t* n) { *n = cubin(p).size(); return 0; }
int nvrtcGetCUBIN(Program* p, char* out) { const std::string made = cubin(p); std::memcpy(out, made.data(), made.size()); return 0; }
}
