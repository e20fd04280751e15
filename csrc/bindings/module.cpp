// ttt_kernels._C: what the Python side sees of csrc. Torch-free: pointers, sizes and streams travel as
// integers, results as Python objects. Nothing here touches CUDA at import.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "arguments.h"
#include "ttt/device.h"
#if TTT_EMULATED
#include "control.h"
#endif

namespace py = pybind11;

namespace {

py::object error_text(const ttt::Status& status) {
  if (status.code == 0) return py::none();
  return py::str(std::string(status.name) + ": " + status.text);
}

py::tuple cuda_architectures() {
  return py::tuple(py::str(TTT_CUDA_ARCHITECTURES).attr("split")());
}

std::string cuda_runtime_version() {
  int version = 0;
  const ttt::Status status = ttt::runtime_version(&version);
  if (status.code != 0) throw std::runtime_error(std::string(status.name) + ": " + status.text);
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

py::dict describe_image(int index) {
  ttt::DeviceImage image{};
  const ttt::Status status = ttt::device_image(index, &image);
  py::dict result;
  result["image"] = py::none();
  if (status.code == 0) {
    result["image"] = "sm_" + std::to_string(image.architecture) + (image.specific ? "a" : "");
  }
  result["error"] = error_text(status);
  return result;
}

py::dict describe_device(int index) {
  ttt::DeviceFacts facts{};
  const ttt::Status status = ttt::device_facts(index, &facts);
  py::dict result;
  result["index"] = index;
  if (status.code != 0) {
    result["error"] = error_text(status);
    return result;
  }
  result["name"] = facts.name;
  result["compute_capability"] = py::make_tuple(facts.compute_major, facts.compute_minor);
  result["multiprocessors"] = facts.multiprocessors;
  result["memory_bytes"] = facts.memory_bytes;
  result["shared_memory_per_block_bytes"] = facts.shared_memory_per_block_bytes;
  result.attr("update")(describe_image(index));
  return result;
}

py::dict device_query() {
  int count = 0;
  const ttt::Status status = ttt::device_count(&count);
  py::list devices;
  for (int index = 0; index < count; ++index) devices.append(describe_device(index));
  py::dict result;
  result["devices"] = devices;
  result["error"] = error_text(status);
  return result;
}

}  // namespace

PYBIND11_MODULE(TTT_MODULE, m) {
  m.doc() = "Compiled part of ttt_kernels; import it through ttt_kernels._extension.";
  m.attr("version") = TTT_VERSION;
  m.attr("cuda_architectures") = cuda_architectures();
  m.def("cuda_runtime_version", &cuda_runtime_version,
        "Version of the CUDA runtime linked in, such as '13.0'.");
  m.def("device_query", &device_query,
        "{'devices': [...], 'error': reason or None}. A device has its index, name,\n"
        "compute_capability, multiprocessors, memory_bytes, shared_memory_per_block_bytes, the\n"
        "compiled `image` it loads (such as 'sm_90a', or None) and the `error` that kept it from\n"
        "loading one. A missing driver is a reason, not an exception. Creates a CUDA context on\n"
        "every device.");
  m.def("describe_device", &describe_device, py::arg("index"),
        "The entry of one device in device_query()['devices']; no other gets a CUDA context.");
  m.attr("emulated") = bool{TTT_EMULATED};
#if TTT_EMULATED
  m.def("set_schedule", &ttt::emulation::set_schedule, py::arg("order"), py::arg("timing"),
        py::arg("seed"), "Order of threads and time of asynchronous effects; see emulation/control.h.");
  m.def("set_multiprocessors", &ttt::emulation::set_multiprocessors, py::arg("count"),
        "Of the one device there is; see emulation/control.h.");
#endif
  ttt::bindings::add_scan(m);
  ttt::bindings::add_step(m);
  ttt::bindings::add_step_size(m);
}
