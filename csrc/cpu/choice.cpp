#include "cpu/choice.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cpu/vec.h"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <sys/stat.h>
#include <unistd.h>
#define W2S_UNIX 1
#else
#define W2S_UNIX 0
#endif

namespace w2s {
namespace {

enum class Mode { own, library, automatic };
Mode mode() {
  static const Mode found = [] {
    const char* text = std::getenv("W2S_FAST_GEMM");
    if (text && !std::strcmp(text, "own")) return Mode::own;
    if (text && !std::strcmp(text, "library")) return Mode::library;
    return Mode::automatic;
  }();
  return found;
}

// at::globalContext().deterministicAlgorithms(): torch's stable interface has no word for it.
bool deterministic() {
#if W2S_UNIX
  using Context = void* (*)();
  using Answer = bool (*)(const void*);
  static const auto context = reinterpret_cast<Context>(dlsym(RTLD_DEFAULT, "_ZN2at13globalContextEv"));
  static const auto answer = reinterpret_cast<Answer>(dlsym(RTLD_DEFAULT, "_ZNK2at7Context23deterministicAlgorithmsEv"));
  return !context || !answer || answer(context());
#else
  return true;
#endif
}

// What the rates depend on: this CPU, the instruction set in use, torch and its threads.
std::string machine() {
  std::string found = "cpu";
  if (FILE* file = std::fopen("/proc/cpuinfo", "r")) {
    char line[4096];
    while (std::fgets(line, sizeof line, file)) {
      const std::string text(line);
      if (text == "\n") break;
      for (const char* field : {"cpu family", "model\t", "model name", "stepping"})
        if (text.rfind(field, 0) == 0) found += "-" + text.substr(text.find(':') + 1);
    }
    std::fclose(file);
  }
  std::string clean;
  for (const char c : found)
    if (std::isalnum(static_cast<unsigned char>(c))) clean += c;
    else if (!clean.empty() && clean.back() != '-') clean += '-';
  while (!clean.empty() && clean.back() == '-') clean.pop_back();
  return clean + "-isa" + std::to_string(int(isa())) + "-threads" + std::to_string(torch::stable::get_num_threads()) + "-torch" +
         std::to_string(aoti_torch_abi_version() >> 48 & 0xffff);
}

constexpr const char* OUR_SIDE = "7";  // raised where what was raced becomes another

// <cache>/rates/<machine>/, made if need be; empty where there is no place
const std::string& folder() {
  static const std::string found = [] {
    std::string path;
#if W2S_UNIX
    if (const char* own = std::getenv("W2S_FAST_CACHE"); own && *own) path = own;
    else if (const char* xdg = std::getenv("XDG_CACHE_HOME"); xdg && *xdg) path = std::string(xdg) + "/w2s_fast";
    else if (const char* home = std::getenv("HOME"); home && *home) path = std::string(home) + "/.cache/w2s_fast";
    else return path;
    path += "/rates/" + machine() + "-" + OUR_SIDE + "/";
    for (size_t at = path.find('/', 1); at != std::string::npos; at = path.find('/', at + 1)) mkdir(path.substr(0, at).c_str(), 0777);
#endif
    return path;
  }();
  return found;
}

bool read(const std::string& path, double& own, double& library) {
  FILE* file = folder().empty() ? nullptr : std::fopen(path.c_str(), "r");
  if (!file) return false;
  const bool whole = std::fscanf(file, "%lf %lf", &own, &library) == 2;
  std::fclose(file);
  return whole && own > 0 && library > 0;
}

void write(const std::string& path, double own, double library) {
#if W2S_UNIX
  if (folder().empty()) return;
  const std::string draft = path + "." + std::to_string(getpid());
  FILE* file = std::fopen(draft.c_str(), "w");
  if (!file) return;
  const bool good = std::fprintf(file, "%.4g %.4g\n", own, library) > 0;
  if (std::fclose(file) != 0 || !good || std::rename(draft.c_str(), path.c_str()) != 0) std::remove(draft.c_str());
#endif
}

double seconds(const Choice::Work& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

bool library_allowed() { return mode() != Mode::own && !deterministic(); }
bool library_forced() { return mode() == Mode::library; }

void Choice::settle(const std::function<void(const Race&)>& set_up) {
  std::call_once(once, [&] {
    const std::string path = folder() + name;
    if (read(path, own, library)) return;
    set_up([&](double units, const Work& ours, const Work& theirs) {
      double first = 1e9, second = 1e9;  // in turns; the best of some rounds is what nothing disturbed
      for (int round = 0; round < 12; ++round) {
        first = std::min(first, seconds(ours));
        second = std::min(second, seconds(theirs));
      }
      own = units / first;
      library = units / second;
    });
    write(path, own, library);
  });
}

}  // namespace w2s
