//! The JSON of the Docker Engine API, as types: what requests hold (every field optional, since clients of
//! many ages send them) and what answers hold, in Docker's order of fields.
//!
//! They are Shoal's own where bollard's models lack a field, name an enum's value instead of the field that
//! has it, or write maps in random order.

#[expect(
    clippy::struct_field_names,
    clippy::struct_excessive_bools,
    reason = "the fields and their names are Docker's"
)]
pub(super) mod answer;
pub(super) mod attachment;
#[expect(clippy::struct_excessive_bools, reason = "the fields are Docker's")]
pub(super) mod network;
pub(super) mod spec;
pub(super) mod status;
pub(super) mod swarm;

/// Defines a request's struct: each field may be missing or null, and is left out when there is nothing in it.
macro_rules! optional_fields {
    ($($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $ty:ty,)* })*) => {$(
        $(#[$meta])*
        #[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(rename_all = "PascalCase")]
        pub(in crate::docker) struct $name {
            $(
                $(#[$field_meta])*
                #[serde(default, skip_serializing_if = "Option::is_none")]
                pub(in crate::docker) $field: Option<$ty>,
            )*
        }
    )*};
}
use optional_fields;
