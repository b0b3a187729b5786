// The settings, environment variables that README.md has in a table. Read once, when the library is loaded; what cannot
// be read to the last character ends the process, because a fault that is silently not injected would make the test
// that asked for it pass.
#include <sys/types.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <sstream>

#include "emulator.h"

extern char** environ;

namespace emulator {

void refuse_knob(const std::string& knob, const std::string& reason) {
  std::cerr << "ascend_emulator: ASCEND_EMULATOR_" << knob << "=" << getenv(("ASCEND_EMULATOR_" + knob).c_str())
            << ": " << reason << std::endl;
  _exit(2);
}

namespace {

std::vector<std::string> split(const std::string& text, char by) {
  std::vector<std::string> parts;
  std::istringstream stream(text + by);  // a trailing separator gives an empty last part, which nothing accepts
  for (std::string part; std::getline(stream, part, by);) parts.push_back(part);
  return parts;
}

class Reader {  // of one knob: every part of its value must be what it should be
 public:
  explicit Reader(std::string knob) : knob(std::move(knob)) {}

  double number(const std::string& text, double least = -INFINITY) const {
    char* end = nullptr;
    double value = std::strtod(text.c_str(), &end);
    if (text.empty() || std::isspace(text[0]) || *end || !std::isfinite(value))
      refuse_knob(knob, "'" + text + "' is not a number");
    if (value < least) refuse_knob(knob, "'" + text + "' is too small");
    return value;
  }

  int64_t integer(const std::string& text, int64_t least = 0, int64_t most = int64_t(1) << 50) const {
    double value = number(text);
    if (value != std::floor(value) || value < least || value > most)
      refuse_knob(knob, "'" + text + "' is not an integer from " + std::to_string(least) + " on");
    return int64_t(value);
  }

  bool flag(const std::string& text) const { return integer(text, 0, 1); }

  std::string choice(const std::string& text, const std::vector<std::string>& from) const {
    std::string all;
    for (const std::string& one : from) {
      if (text == one) return text;
      all += (all.empty() ? "" : ", ") + one;
    }
    refuse_knob(knob, "'" + text + "' is not one of " + all);
  }

  int64_t bytes(std::string text) const {
    int shift = text.empty() ? 0 : text.back() == 'G' ? 30 : text.back() == 'M' ? 20 : 0;
    if (!shift) refuse_knob(knob, "a size in M or G is expected, such as 512M or 32G");
    text.pop_back();
    return integer(text, 1, 1 << 20) << shift;
  }

  // ",from=N,every=N,once,hf32,device=I": what may follow an error code or the kind of a fault
  Trigger trigger(const std::vector<std::string>& parts, bool counts, bool values = false) const {
    Trigger when;
    std::optional<int64_t> from;
    for (size_t i = 1; i < parts.size(); ++i) {
      const std::string& part = parts[i];
      if (counts && part.rfind("from=", 0) == 0) from = integer(part.substr(5), 1);
      else if (counts && part.rfind("every=", 0) == 0) when.every = integer(part.substr(6), 1);
      else if (counts && part == "once") when.once = true;
      else if (values && part == "hf32") when.hf32 = true;
      else if (part.rfind("device=", 0) == 0) when.device = integer(part.substr(7));
      else refuse_knob(knob, "'" + part + "' is not understood here");
    }
    when.from = from.value_or(when.every);  // every=N alone means the calls N, 2 N, 3 N ...
    return when;
  }

  Code code(const std::string& text, bool counts) const {
    auto parts = split(text, ',');
    return {aclError(integer(parts[0], 1, INT_MAX)), trigger(parts, counts)};
  }

  Fault fault(const std::string& text) const {
    static const std::map<std::string, std::pair<Fault::Kind, bool>> kinds = {  // name: kind, takes a value
        {"nan", {Fault::nan, false}},      {"inf", {Fault::inf, false}},        {"scale", {Fault::scale, true}},
        {"offset", {Fault::offset, true}}, {"element", {Fault::element, true}}, {"error", {Fault::error, true}},
        {"hang", {Fault::hang, false}},    {"async_error", {Fault::async_error, true}}};
    auto colon = text.find(':');
    if (colon == std::string::npos || colon == 0) refuse_knob(knob, "'" + text + "' is not OPERATOR:KIND");
    auto parts = split(text.substr(colon + 1), ',');
    auto equals = parts[0].find('=');
    auto kind = kinds.find(parts[0].substr(0, equals));
    if (kind == kinds.end()) refuse_knob(knob, "'" + parts[0] + "' is not a kind of fault");
    if (kind->second.second != (equals != std::string::npos))
      refuse_knob(knob, "'" + kind->first + (kind->second.second ? "' needs a value" : "' takes no value"));
    bool values = kind->second.first <= Fault::element;  // a fault in the output
    Fault fault{text.substr(0, colon), kind->second.first, 0, trigger(parts, true, values)};
    if (kind->second.second) {
      std::string value = parts[0].substr(equals + 1);
      bool code = fault.kind == Fault::error || fault.kind == Fault::async_error;
      fault.value = code ? double(integer(value, 1, INT_MAX)) : number(value);
    }
    return fault;
  }

  KernelTime kernel_time(const std::string& text) const {
    auto options = split(text, ',');
    auto parts = split(options[0], '=');
    if (parts.size() != 2 || parts[0].empty()) refuse_knob(knob, "'" + text + "' is not OPERATOR=MS[+MS_PER_ROW]");
    auto ms = split(parts[1], '+');
    if (ms.size() > 2) refuse_knob(knob, "'" + text + "' is not OPERATOR=MS[+MS_PER_ROW]");
    auto device = trigger(options, false).device;
    return {parts[0], number(ms[0], 0), ms.size() == 2 ? number(ms[1], 0) : 0, device};
  }

 private:
  std::string knob;
};

// How many devices the process sees: as in CANN, what follows an id that does not exist is not looked at.
int64_t visible(int64_t devices) {
  const char* ids = getenv("ASCEND_RT_VISIBLE_DEVICES");
  if (!ids) return devices;
  int64_t count = 0;
  for (const std::string& id : split(ids, ',')) {
    if (id.empty() || id.find_first_not_of("0123456789") != std::string::npos || std::stoll(id) >= devices) break;
    ++count;
  }
  return count;
}

Knobs read() {
  Knobs k;
  std::string prefix = "ASCEND_EMULATOR_";
  for (char** variable = environ; *variable; ++variable) {
    if (strncmp(*variable, prefix.c_str(), prefix.size()) != 0) continue;
    std::string text = *variable + prefix.size(), name = text.substr(0, text.find('='));
    std::string value = text.substr(name.size() + 1);
    Reader reader(name);
    if (name == "DEVICES") k.devices = reader.integer(value, 0, 64);
    else if (name == "SOC") k.soc = value;
    else if (name == "MEMORY") k.memory = reader.bytes(value);
    else if (name == "HF32") k.hf32 = reader.flag(value);
    else if (name == "HF32_BITS") k.hf32_bits = std::stoi(reader.choice(value, {"11", "10"}));
    else if (name == "HF32_ROUNDING") k.hf32_rounding = reader.choice(value, {"nearest", "even", "truncate", "tuned"});
    else if (name == "HF32_ONLY") k.hf32_only = reader.choice(value, {"depthwise", "pointwise", "dense"});
    else if (name == "HF32_FROM") k.hf32_from = reader.integer(value, 1);
    else if (name == "HF32_MATMUL") k.hf32_matmul = reader.flag(value);
    else if (name == "GELU") k.gelu = reader.choice(value, {"tanh", "erf", "ibert"});
    else if (name == "PERTURB") k.perturb = reader.number(value, 0);
    else if (name == "FAULT") for (auto& fault : split(value, ';')) k.faults.push_back(reader.fault(fault));
    else if (name == "KERNEL_TIME") for (auto& time : split(value, ';')) k.kernel_times.push_back(reader.kernel_time(time));
    else if (name == "SYNCHRONIZE_ERROR") k.synchronize_error = reader.code(value, true);
    else if (name == "INIT_ERROR") k.init_error = reader.code(value, false);
    else if (name == "SET_DEVICE_ERROR") k.set_device_error = reader.code(value, false);
    else if (name == "TRACE" && !value.empty()) k.trace = value;
    else if (name == "WITHOUT") refuse_knob(name, "the libraries are here: it is for the launcher and environment()");
    else refuse_knob(name, "there is no such knob, or no such value");
  }
  k.devices = visible(k.devices);
  return k;
}

}  // namespace

const Knobs& knobs() {
  static const Knobs& read_once = immortal<Knobs>(read());
  return read_once;
}

__attribute__((constructor)) static void read_at_load() { knobs(); }

}  // namespace emulator
