// Step sizes: keyword arguments to the struct of ttt/step_size.h, name by name.
#include "ttt/step_size.h"

#include "arguments.h"

namespace ttt::bindings {
namespace {

StepSize take_parameters(Arguments& a) {
  StepSize p{};
  p.place = a.place();
  p.operand = a.operand();
  p.rule = a.take<bool>("spectral") ? StepRule::kSpectral : StepRule::kClipped;
  p.d = a.take<std::int64_t>("d");
  p.f = a.take<std::int64_t>("f");
  p.chunk = a.take<std::int64_t>("chunk");
  p.chunks = a.take<std::int64_t>("chunks");
  p.first = a.pointer<const std::int64_t>("first");
  p.z = a.pointer<const void>("z");
  p.z_stride = a.take<std::int64_t>("z_stride");
  p.v = a.pointer<const void>("v");
  p.v_stride = a.take<std::int64_t>("v_stride");
  p.lr = a.take<double>("lr");
  p.iterations = a.take<int>("iterations");
  p.max_norm = a.take<double>("max_norm");
  p.step = a.pointer<float>("step");
  p.workspace = a.pointer<void>("workspace");
  a.finish();
  return p;
}

std::int64_t workspace(const py::kwargs& kwargs) {
  Arguments a("step_size_workspace", kwargs);
  return step_size_workspace(take_parameters(a));
}

void compute(const py::kwargs& kwargs) {
  Arguments a("step_size", kwargs);
  const StepSize p = take_parameters(a);
  run("step_size", p.place, [&] { return step_size(p); });
}

}  // namespace

void add_step_size(py::module_& m) {
  m.def("step_size_workspace", &workspace, "Bytes of the workspace, from the arguments of step_size.");
  m.def("step_size", &compute, "See ttt/step_size.h.");
}

}  // namespace ttt::bindings
