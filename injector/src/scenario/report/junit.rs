//! `JUnit` XML, for CI systems: a test for the run as a whole, for every check, every fault (that it acted) and every
//! step that failed.

use std::time::Duration;

use quick_junit::{
    NonSuccessKind, Property, Report, SerializeError, TestCase, TestCaseStatus, TestSuite,
};

use super::story::Story;
use crate::scenario::{
    file::Kind,
    record::{Record, Verdict},
};

/// The report of these records.
pub fn junit(records: &[Record]) -> Result<String, SerializeError> {
    let story = Story::of(records);
    let name = story
        .started
        .map_or("scenario", |started| started.scenario.as_str());
    let seconds = |time: f64| Duration::try_from_secs_f64(time.max(0.0)).unwrap_or_default();
    let mut suite = TestSuite::new(name);
    suite.set_time(seconds(story.length));
    if let Some(started) = story.started {
        for (key, value) in [
            ("seed", started.seed.to_string()),
            ("kernel", started.kernel.clone()),
            ("version", started.version.clone()),
            ("file", started.file.clone()),
            ("replay", started.replay.clone()),
        ] {
            suite.add_property(Property::new(key, &value));
        }
    }
    let failed = |kind: NonSuccessKind, message: &str| {
        let mut status = TestCaseStatus::non_success(kind);
        status.set_message(message);
        status
    };
    let mut case = |class: &str, name: &str, status: TestCaseStatus, time: f64| {
        let mut case = TestCase::new(name, status);
        case.set_classname(class);
        case.set_time(seconds(time));
        suite.add_test_case(case);
    };
    let whole = match (story.ended.verdict, story.ended.as_expected) {
        (_, true) => TestCaseStatus::success(),
        (Verdict::Void, _) => failed(NonSuccessKind::Error, &story.ended.reasons.join("\n")),
        (verdict, false) => failed(
            NonSuccessKind::Failure,
            &format!("{verdict}: {}", story.ended.reasons.join("\n")),
        ),
    };
    case("run", name, whole, story.length);
    // A run that is expected to fail has failed checks, and is a success: only the run itself is a test then.
    let expected_to_fail = story.ended.as_expected && story.ended.verdict == Verdict::Failed;
    for check in &story.checks {
        let blamed = story
            .ended
            .reasons
            .iter()
            .find(|reason| reason.contains(&format!("check {} ", check.info.name)));
        let status = match blamed {
            Some(reason) if !expected_to_fail && check.info.kind != Kind::Measure => {
                failed(NonSuccessKind::Failure, reason)
            }
            _ => TestCaseStatus::success(),
        };
        case("check", &check.info.name, status, story.length);
    }
    for fault in &story.faults {
        let (Some(started), Some(ended)) = (fault.started, fault.ended) else {
            continue;
        };
        let status = if started.expect_effect && ended.matched_packets == 0 && !expected_to_fail {
            failed(
                NonSuccessKind::Failure,
                "it did nothing: no packet matched its rules",
            )
        } else {
            TestCaseStatus::success()
        };
        case("fault", fault.step, status, fault.to - fault.from);
    }
    for step in &story.steps {
        if let Some(failure) = step.failure
            && !expected_to_fail
        {
            case(
                "step",
                step.path,
                failed(NonSuccessKind::Failure, failure),
                step.to.unwrap_or(step.from) - step.from,
            );
        }
    }
    let mut report = Report::new("injector");
    report.add_test_suite(suite);
    report.to_string()
}
