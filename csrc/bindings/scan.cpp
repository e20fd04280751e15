// The scan: keyword arguments to the structs of ttt/scan.h, name by name.
#include "ttt/scan.h"

#include <pybind11/stl.h>

#include <vector>

#include "arguments.h"

namespace ttt::bindings {
namespace {

// `offsets` are kept by the caller: the struct only points at them.
ScanCall take_call(Arguments& a, std::vector<std::int64_t>& offsets) {
  ScanCall call{};
  call.place = a.place();
  call.path = static_cast<Path>(a.take<int>("path"));
  call.operand = a.operand();
  call.d = a.take<std::int64_t>("d");
  call.f = a.take<std::int64_t>("f");
  call.chunk = a.take<std::int64_t>("chunk");
  call.tokens = a.take<std::int64_t>("tokens");
  call.sequences = a.take<std::int64_t>("sequences");
  call.blocks = a.pointer<const ScanBlock>("blocks");
  offsets = a.take<std::vector<std::int64_t>>("offsets");
  call.offsets = offsets.data();
  call.launches = static_cast<std::int64_t>(offsets.size()) - 1;
  call.z = a.pointer<const void>("z");
  call.z_stride = a.take<std::int64_t>("z_stride");
  call.v = a.pointer<const void>("v");
  call.v_stride = a.take<std::int64_t>("v_stride");
  call.step_size = a.pointer<const float>("step_size");
  call.lr = a.take<float>("lr");
  call.preserve_row_norm = a.take<bool>("preserve_row_norm");
  return call;
}

void norms(const py::kwargs& kwargs) {
  Arguments a("scan_norms", kwargs);
  ScanCall call{};
  call.place = a.place();
  call.operand = a.operand();
  call.d = a.take<std::int64_t>("d");
  call.f = a.take<std::int64_t>("f");
  call.sequences = a.take<std::int64_t>("sequences");
  call.chunk = 1;  // no token is read
  const auto* weight = a.pointer<const float>("weight");
  auto* into = a.pointer<float>("norms");
  a.finish();
  run("scan_norms", call.place, [&] { return scan_norms(call, weight, into); });
}

int tile_columns(const py::kwargs& kwargs) {
  Arguments a("scan_tile_columns", kwargs);
  std::vector<std::int64_t> offsets;
  const ScanCall call = take_call(a, offsets);
  a.finish();
  return scan_tile_columns(call);
}

void forward(const py::kwargs& kwargs) {
  Arguments a("scan_forward", kwargs);
  std::vector<std::int64_t> offsets;
  ScanForward p{};
  p.call = take_call(a, offsets);
  p.y = a.pointer<void>("y");
  p.y_stride = a.take<std::int64_t>("y_stride");
  p.state = a.pointer<float>("state");
  p.write_last = a.take<bool>("write_last");
  p.shadows[0] = a.pointer<void>("shadow_0");
  p.shadows[1] = a.pointer<void>("shadow_1");
  p.norms[0] = a.pointer<float>("norms_0");
  p.norms[1] = a.pointer<float>("norms_1");
  p.w0_norms = a.pointer<const float>("w0_norms");
  a.finish();
  run("scan_forward", p.call.place, [&] { return scan_forward(p); });
}

ScanBackward take_backward(Arguments& a, std::vector<std::int64_t>& offsets) {
  ScanBackward p{};
  p.call = take_call(a, offsets);
  p.dy = a.pointer<const void>("dy");
  p.dy_stride = a.take<std::int64_t>("dy_stride");
  p.initial = a.pointer<const void>("initial");
  p.initial_stride = a.take<std::int64_t>("initial_stride");
  p.initial_is_float32 = a.take<bool>("initial_is_float32");
  p.carried = a.pointer<const float>("carried");
  p.carried_is_final = a.take<bool>("carried_is_final");
  p.has_dstate = a.take<bool>("has_dstate");
  p.grad = a.pointer<float>("grad");
  p.dz = a.pointer<void>("dz");
  p.dv = a.pointer<void>("dv");
  p.dstep = a.pointer<float>("dstep");
  p.norm_grad = a.pointer<float>("norm_grad");
  p.w0_norms = a.pointer<const float>("w0_norms");
  p.weight = a.pointer<float>("weight");
  p.shadow = a.pointer<void>("shadow");
  p.grad_shadow = a.pointer<void>("grad_shadow");
  p.workspace = a.pointer<void>("workspace");
  a.finish();
  return p;
}

std::int64_t backward_workspace(const py::kwargs& kwargs) {
  Arguments a("scan_backward_workspace", kwargs);
  std::vector<std::int64_t> offsets;
  return scan_backward_workspace(take_backward(a, offsets));
}

void backward(const py::kwargs& kwargs) {
  Arguments a("scan_backward", kwargs);
  std::vector<std::int64_t> offsets;
  const ScanBackward p = take_backward(a, offsets);
  run("scan_backward", p.call.place, [&] { return scan_backward(p); });
}

}  // namespace

void add_scan(py::module_& m) {
  m.def("scan_norms", &norms, "Partial square row norms of float32 weights; see ttt/scan.h.");
  m.def("scan_forward", &forward, "See ttt/scan.h.");
  m.def("scan_tile_columns", &tile_columns, "See ttt/scan.h; takes what all scan calls take.");
  m.def("scan_backward_workspace", &backward_workspace,
        "Bytes of the backward's workspace, from the arguments of scan_backward.");
  m.def("scan_backward", &backward, "See ttt/scan.h.");
}

}  // namespace ttt::bindings
