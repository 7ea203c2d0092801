// The task dkmCheck, a part of `check`. In the module's build.gradle.kts: apply(from = "dkm.gradle.kts")
// It runs again when the export, the gates or the program's path changed, or the last run failed.

val dkmExport = layout.projectDirectory.dir("model")
val dkmGates = layout.projectDirectory.file("gates.toml")
val dkmReport = layout.buildDirectory.file("test-results/dkm/TEST-dkm.xml")

// where it is not on the PATH: -Pdkm=/path/to/.venv/bin/dkm, or a line in gradle.properties
val dkm = (findProperty("dkm") ?: "dkm").toString()

val dkmCheck = tasks.register<Exec>("dkmCheck") {
    group = "verification"
    description = "Checks the exported model against PyTorch and the gates of the app."
    inputs.property("dkm", dkm)
    inputs.dir(dkmExport).withPathSensitivity(PathSensitivity.RELATIVE)
    inputs.file(dkmGates).withPathSensitivity(PathSensitivity.NONE)
    outputs.file(dkmReport)
    commandLine(
        dkm, "check", dkmExport.asFile,
        "--gates", dkmGates.asFile,
        "--junit", dkmReport.get().asFile,
        "--force" // replaces the report of the last run
    )
    // an exit code other than 0 fails the task: that is what Exec does
}

tasks.matching { it.name == "check" }.configureEach { dependsOn(dkmCheck) }
