// Keyword arguments of a binding, taken by name: every one is asked for once, and none is left over.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <string>

#include "ttt/call.h"

namespace ttt::bindings {

namespace py = pybind11;

class Arguments {
 public:
  Arguments(const char* function, py::kwargs values) : function_(function), values_(std::move(values)) {}

  template <class T>
  T take(const char* name) {
    if (!values_.contains(name)) fail("needs the argument", name);
    const py::object value = values_.attr("pop")(name);
    try {
      return value.cast<T>();
    } catch (const py::cast_error&) {
      fail("got a value of another type for", name);
    }
  }

  // An address as Python counts it; None is null.
  template <class T>
  T* pointer(const char* name) {
    if (values_.contains(name) && py::object(values_[name]).is_none()) {
      values_.attr("pop")(name);
      return nullptr;
    }
    return reinterpret_cast<T*>(take<std::uintptr_t>(name));
  }

  Place place() { return {take<int>("device"), take<std::uintptr_t>("stream")}; }
  Operand operand() { return take<bool>("bfloat16") ? Operand::kBfloat16 : Operand::kFloat16; }

  void finish() const {
    if (values_.size() == 0) return;
    fail("has no argument", py::str(values_.begin()->first).cast<std::string>().c_str());
  }

 private:
  [[noreturn]] void fail(const char* what, const char* name) const {
    throw py::type_error(std::string(function_) + " " + what + " " + name);
  }

  const char* function_;
  py::kwargs values_;
};

// Runs `call` on the device of `place` without Python's lock; an error of the runtime becomes a RuntimeError.
void run(const char* function, const Place& place, const std::function<Status()>& call);

void add_scan(py::module_& m);
void add_step(py::module_& m);
void add_step_size(py::module_& m);

}  // namespace ttt::bindings
