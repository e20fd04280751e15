// Decode: keyword arguments to the structs of ttt/step.h, name by name.
#include "ttt/step.h"

#include "arguments.h"

namespace ttt::bindings {
namespace {

template <class Parameters>
void take_sizes(Arguments& a, Parameters& p) {
  p.place = a.place();
  p.operand = a.operand();
  p.batch = a.take<std::int64_t>("batch");
  p.tokens = a.take<std::int64_t>("tokens");
  p.d = a.take<std::int64_t>("d");
  p.f = a.take<std::int64_t>("f");
  p.pool = a.take<std::int64_t>("pool");
  p.z = a.pointer<const void>("z");
  p.z_batch_stride = a.take<std::int64_t>("z_batch_stride");
  p.z_token_stride = a.take<std::int64_t>("z_token_stride");
  p.weight_stride = a.take<std::int64_t>("weight_stride");
  p.row_stride = a.take<std::int64_t>("row_stride");
  p.slots = a.pointer<const std::int64_t>("slots");
}

StepApply take_apply(Arguments& a) {
  StepApply p{};
  take_sizes(a, p);
  p.weight = a.pointer<const float>("weight");
  p.row_scale = a.pointer<const float>("row_scale");
  p.y = a.pointer<void>("y");
  p.workspace = a.pointer<float>("workspace");
  a.finish();
  return p;
}

std::int64_t apply_workspace(const py::kwargs& kwargs) {
  Arguments a("step_apply_workspace", kwargs);
  return step_apply_workspace(take_apply(a));
}

void apply(const py::kwargs& kwargs) {
  Arguments a("step_apply", kwargs);
  const StepApply p = take_apply(a);
  run("step_apply", p.place, [&] { return step_apply(p); });
}

void update(const py::kwargs& kwargs) {
  Arguments a("step_update", kwargs);
  StepUpdate p{};
  take_sizes(a, p);
  p.v = a.pointer<const void>("v");
  p.v_batch_stride = a.take<std::int64_t>("v_batch_stride");
  p.v_token_stride = a.take<std::int64_t>("v_token_stride");
  p.step_size = a.pointer<const float>("step_size");
  p.lr = a.take<float>("lr");
  p.weight = a.pointer<float>("weight");
  a.finish();
  run("step_update", p.place, [&] { return step_update(p); });
}

}  // namespace

void add_step(py::module_& m) {
  m.def("step_apply_workspace", &apply_workspace,
        "Bytes of the workspace, from the arguments of step_apply.");
  m.def("step_apply", &apply, "See ttt/step.h.");
  m.def("step_update", &update, "See ttt/step.h.");
}

}  // namespace ttt::bindings
