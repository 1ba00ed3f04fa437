//! Machinery that the end-to-end tests share.

pub mod generate;
pub mod lab;
pub mod model;
pub mod subject;
pub mod table;
