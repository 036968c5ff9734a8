// A device that does nothing, so that autograd goes backward over fake tensors on it: one device, one queue, no waiting.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
using namespace c10;
constexpr DeviceType CARD = DeviceType::PrivateUse1;

struct Guard final : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return CARD; }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Device getDevice() const override { return Device(CARD, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};

impl::DeviceGuardImplRegistrar registrar(CARD, new Guard);
const bool registered = (at::RegisterPrivateUse1HooksInterface(new Hooks), true);
}  // namespace
