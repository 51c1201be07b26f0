//! What runs beside an app, against a scripted KMS and an emulated module on real sockets: delivery, renewal, guest API.

#![allow(clippy::unwrap_used, reason = "a set-up that fails is a failed test")]

#[path = "service/app.rs"]
mod app;
#[path = "service/delivery.rs"]
mod delivery;
#[path = "service/guest_api.rs"]
mod guest_api;
#[path = "service/hostile.rs"]
mod hostile;
mod support;
