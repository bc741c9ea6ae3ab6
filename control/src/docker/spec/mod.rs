//! A service's spec: from the API's words to the model's with every field checked, and back.

mod image;
mod read;
mod refuse;
mod show;

pub(super) use image::built_in_digest;
pub(super) use read::service_spec;
pub(super) use show::{endpoint_spec, port, service_spec as show_service_spec, task_template};
