"""Shared by the tests: rendered services, repositories of the template, pages as steps, images without Docker."""
