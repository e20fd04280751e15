#include <functional>
#include <stdexcept>

#include "arguments.h"

namespace ttt::bindings {
namespace {

void check(const char* function, const Status& status) {
  if (status.code == 0) return;
  throw std::runtime_error(std::string(function) + ": " + status.name + ": " + status.text);
}

// The device of a call, for as long as this lives.
class DeviceGuard {
 public:
  DeviceGuard(const char* function, int device) { check(function, use_device(device, &previous_)); }
  ~DeviceGuard() {
    int ignored = 0;
    use_device(previous_, &ignored);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

}  // namespace

void run(const char* function, const Place& place, const std::function<Status()>& call) {
  const py::gil_scoped_release unlocked;
  const DeviceGuard guard(function, place.device);
  check(function, call());
}

}  // namespace ttt::bindings
