"""A model of the part of `pyzed.sl` that the driver calls, after the published binding (5.4). Not the SDK."""

import enum
import time
from types import SimpleNamespace

import numpy as np


class ERROR_CODE(enum.Enum):  # noqa: N801
    CORRUPTED_FRAME = -2
    SUCCESS = 0
    FAILURE = 1
    CAMERA_NOT_DETECTED = 4
    NOT_ENOUGH_GPU_MEMORY = 3
    END_OF_SVOFILE_REACHED = 13


RESOLUTION = enum.Enum("RESOLUTION", ["HD2K", "HD1080", "HD720", "VGA"])
DEPTH_MODE = enum.Enum("DEPTH_MODE", ["NONE"])
VIEW = enum.Enum("VIEW", ["LEFT", "RIGHT", "LEFT_UNRECTIFIED", "RIGHT_UNRECTIFIED", "SIDE_BY_SIDE"])
MEM = enum.Enum("MEM", ["CPU"])
TIME_REFERENCE = enum.Enum("TIME_REFERENCE", ["IMAGE"])
VIDEO_SETTINGS = enum.Enum(
    "VIDEO_SETTINGS", ["AEC_AGC", "EXPOSURE", "GAIN", "WHITEBALANCE_AUTO", "WHITEBALANCE_TEMPERATURE"]
)


class InitParameters:
    svo = serial = None

    def set_from_svo_file(self, path):
        self.svo = path

    def set_from_serial_number(self, serial):
        self.serial = serial


class Mat:
    def get_data(self):
        return self.data


class Camera:
    """`script`: what each `grab` answers; a number is a frame that was preceded by that many dropped ones."""

    script: tuple = ()
    opens = "SUCCESS"
    size = (1280, 720)
    stamp_delay_ns = 5_000_000
    length = 3  # of an SVO

    @staticmethod
    def get_sdk_version():
        return "5.4.0"

    def open(self, parameters):
        type(self).last = self
        self.parameters, self.script = parameters, list(type(self).script)
        self.dropped, self.count, self.settings, self.closed = 0, 0, [], False
        return ERROR_CODE[self.opens]

    def get_camera_information(self):
        resolution = SimpleNamespace(width=self.size[0], height=self.size[1])
        return SimpleNamespace(
            camera_configuration=SimpleNamespace(resolution=resolution), camera_model="ZED 2", serial_number=7
        )

    def grab(self):
        time.sleep(0.001)
        self.stamp = time.time_ns() - self.stamp_delay_ns
        if self.parameters.svo is not None:
            if self.count == self.length:
                return ERROR_CODE.END_OF_SVOFILE_REACHED
            self.count += 1
            return ERROR_CODE.SUCCESS
        answer = self.script.pop(0) if self.script else 0
        if isinstance(answer, str):
            return ERROR_CODE[answer]
        self.dropped += answer
        self.count += 1
        return ERROR_CODE.SUCCESS

    def retrieve_image(self, mat, view, memory):
        width = self.size[0] * (2 if view is VIEW.SIDE_BY_SIDE else 1)
        mat.data = np.zeros((self.size[1], width, 4), np.uint8)
        mat.data[...] = (self.count, 20, 30, 255)  # B, G, R, A
        return ERROR_CODE.SUCCESS

    def get_timestamp(self, reference):
        wall = self.stamp
        return SimpleNamespace(get_nanoseconds=lambda: wall)

    def get_frame_dropped_count(self):
        return self.dropped

    def get_svo_position(self):
        return self.count - 1

    def set_svo_position(self, position):
        self.count = position

    def set_camera_settings(self, setting, value):
        self.settings.append((setting.name, value))
        return ERROR_CODE.SUCCESS

    def get_camera_settings(self, setting):
        return ERROR_CODE.SUCCESS, {"EXPOSURE": 41, "GAIN": 12, "WHITEBALANCE_TEMPERATURE": 4700}[setting.name]

    def close(self):
        self.closed = True
